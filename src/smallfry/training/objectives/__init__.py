"""Table of objectives: one module with frozen settings each, found by a scan of this package.

Settings are here without PyTorch, for the command's options; ``build`` imports the objective.
"""
