"""Most accurate model under a budget: search, training, compression and export."""
