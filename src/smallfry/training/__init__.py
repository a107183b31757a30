"""How a model is fitted: configuration, objectives, the loop, checkpoints and run folders."""
