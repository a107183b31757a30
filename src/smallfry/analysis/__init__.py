"""Analysis of trained models: one question a file, each with its page and its numbers."""

from smallfry.analysis.collapse import (
    WatchCollapse,
    etf_head,
    linear_collapse,
    measure_collapse,
)
from smallfry.analysis.criticality import layer_signals, step_signals
from smallfry.analysis.features import Features, collect
from smallfry.analysis.geometry import compare, measure_geometry
from smallfry.analysis.page import ask_all, write_answers
from smallfry.analysis.question import Answer, Picture, Subject, Table, register_question
from smallfry.analysis.subject import load_subject
from smallfry.data.corruptions import corrupt
from smallfry.models.critical import find_critical
from smallfry.models.critical_init import init_critical_

__all__ = [
    "Answer",
    "Features",
    "Picture",
    "Subject",
    "Table",
    "WatchCollapse",
    "ask_all",
    "collect",
    "compare",
    "corrupt",
    "etf_head",
    "find_critical",
    "init_critical_",
    "layer_signals",
    "linear_collapse",
    "load_subject",
    "measure_collapse",
    "measure_geometry",
    "register_question",
    "step_signals",
    "write_answers",
]
