"""The papers' comparisons, each re-runnable and resumable."""
