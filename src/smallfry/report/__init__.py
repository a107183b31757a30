"""Pictures of runs; each function draws one and writes it whole."""
