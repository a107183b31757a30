"""Sub-models that share one model's weights."""
