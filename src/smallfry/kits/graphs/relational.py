"""Base of relational layers: the choice of an execution for a graph.

Executions give the same outputs up to the order of sums:

    edges      a product for each edge, as the formula is written
    compact    a product for each unique (source, relation)
    aggregate  sums in front of the products: one for each unique (destination, relation)
    nodes      a product for each node and relation, of fixed shapes; what tracers are given
    auto       compact or aggregate, whichever has fewer products
"""

from torch import Tensor, nn

from smallfry.errors import UsageError
from smallfry.kits.graphs.pairs import EXECUTIONS, AnyPlan, Plan, StaticPlan, plan
from smallfry.kits.graphs.products import gather_sum, typed_product

__all__ = ["Relational", "glorot_", "product_and_fold", "require_parts"]


def glorot_(tensor: Tensor) -> None:
    """Draw uniformly from ±√(6 / (rows + columns)) of the last two axes, as torch-geometric."""
    bound = (6 / (tensor.shape[-2] + tensor.shape[-1])) ** 0.5
    nn.init.uniform_(tensor, -bound, bound)


class Relational(nn.Module):
    """Base of relational layers: the choice of an execution, and plans.

    Args:
        relations: Relations.
        execution: See the module.

    Raises:
        UsageError: No such execution.
    """

    def __init__(self, relations: int, execution: str) -> None:
        super().__init__()
        if execution not in EXECUTIONS:
            raise UsageError(f"execution is one of {', '.join(EXECUTIONS)}, not '{execution}'")
        if relations < 1:
            raise UsageError(f"a relational layer has at least one relation, not {relations}")
        self.relations, self.execution = relations, execution
        self.chosen: str | None = None  # of auto, at the last graph

    def planned(
        self,
        edge_index: Tensor,
        edge_type: Tensor,
        nodes: tuple[int, int],
        given: AnyPlan | None,
    ) -> tuple[AnyPlan, str]:
        """Return the plan of a graph and the execution for it."""
        if given is None and self.execution == "nodes":
            given = StaticPlan(edge_index, edge_type, nodes, self.relations)
        found = given if given is not None else plan(edge_index, edge_type, nodes, self.relations)
        if found.nodes != nodes or found.relations != self.relations:
            raise UsageError(
                f"the plan is of {found.nodes} nodes and {found.relations} relations, the layer's "
                f"graph has {nodes} and {self.relations}: make a plan of this graph"
            )
        if isinstance(found, StaticPlan):
            self.chosen = "nodes"
        elif self.execution == "nodes":
            raise UsageError("execution nodes makes its own plan: leave it out")
        else:
            self.chosen = found.counts.best() if self.execution == "auto" else self.execution
        return found, self.chosen

    def extra_repr(self) -> str:
        """Describe the layer, with what auto chose for the last graph."""
        chosen = f" ({self.chosen})" if self.execution == "auto" and self.chosen else ""
        return f"relations={self.relations}, execution={self.execution}{chosen}"


def require_parts(**counts: int | None) -> None:
    """Refuse heads, bases or blocks that are none; None stands for a layer without them.

    Raises:
        UsageError: A number below 1.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UsageError(f"{name} is at least 1, not {count}")


def product_and_fold(plan: Plan, slots: Tensor, weight: Tensor) -> Tensor:
    """Multiply sums by their relation's matrix, and sum over relations.

    Args:
        plan: Of the graph.
        slots: Sums of each unique (destination, relation), (pairs, groups, inputs).
        weight: (relations, groups, inputs, outputs).

    Returns:
        (destinations, groups, outputs).
    """
    return gather_sum(plan.fold, typed_product(slots, weight, plan.slots))
