"""Training: configuration, objectives, the loop, checkpoints and run folders."""
