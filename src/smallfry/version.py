"""Package version, recorded in every run and export."""

__version__ = "0.1.0"
