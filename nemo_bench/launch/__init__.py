"""A point from its configuration to its numbers, on this machine or as a Slurm job."""
