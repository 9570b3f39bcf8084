"""Running commands: processes of this machine, and jobs of a Slurm cluster."""
