"""`estimate.py`: what is said of a point, on the terminal and in files; calibration by a run; the best layouts."""
