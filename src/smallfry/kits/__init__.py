"""Kits: tasks with their models, data, metrics and recipes, one folder each.

Nothing imports a kit but by the name of its task, data or model (``smallfry.io.plugins``).
"""
