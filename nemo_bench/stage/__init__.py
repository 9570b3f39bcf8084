"""The stage folder: what a job on a cluster needs besides its dataset (docs/stage_and_data.md)."""
