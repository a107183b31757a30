"""Reproductions of the papers' comparisons, re-runnable and resumable."""
