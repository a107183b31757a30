"""Methods that cut channels."""
