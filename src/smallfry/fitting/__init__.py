"""The most accurate model under a budget: search, training, compression and export."""
