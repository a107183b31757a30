"""Two enumerated search spaces, in which every candidate was trained on digits."""

from smallfry.search.tables.table import TABLES, Table, TableEvaluator, candidates_of, load_table

__all__ = ["TABLES", "Table", "TableEvaluator", "candidates_of", "load_table"]
