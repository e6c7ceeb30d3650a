"""Training: the loop and its phases, the run directory, checkpoints and the launcher."""
