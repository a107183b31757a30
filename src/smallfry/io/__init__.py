"""Files, folders, terminals and signals: the edge of the process."""
