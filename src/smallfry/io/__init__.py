"""Files, folders, terminals and signals."""
