"""Relational graph networks whose messages are computed once for each unique pair.

Wu et al., "Hector: An Efficient Programming and Compilation Framework for Implementing Relational
Graph Neural Networks in GPU Architectures", ASPLOS 2024, arXiv 2301.06284: its two algebraic
optimisations, compact materialisation and linear operator reordering, not its code generator.
"""

from smallfry.kits.graphs.attention import HGTConv, RGATConv
from smallfry.kits.graphs.layers import GINEConv, RGCNConv
from smallfry.kits.graphs.pairs import MessageCounts, Plan, plan

__all__ = ["GINEConv", "HGTConv", "MessageCounts", "Plan", "RGATConv", "RGCNConv", "plan"]
