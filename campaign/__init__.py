"""Faults and hostile input, thousands of times: ``make campaign``. See ``docs/reliability.md``."""
