"""Fault and fuzz campaign: ``make campaign``. See ``docs/reliability.md``."""
