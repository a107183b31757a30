"""The version of the package, written into every run and export."""

__version__ = "0.1.0"
