"""The run folder: what a run leaves, written by its processes and read by reports."""
