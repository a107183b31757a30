"""Methods that train with masks: zeros in weights that stay where they are."""
