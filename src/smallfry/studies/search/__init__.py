"""Searches for a training configuration: `smallfry search`."""
