"""Methods that give numbers fewer bits."""
