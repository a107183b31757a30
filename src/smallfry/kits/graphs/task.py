"""Classification of the nodes of graphs, some of which have a class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from smallfry.data import Split
from smallfry.errors import UsageError
from smallfry.report.confusion import macro_f1
from smallfry.tasks import register
from smallfry.tasks.task import TaskDefaults, share_of
from smallfry_runtime.decoders import graphs as decoder

__all__ = ["Graphs"]

UNLABELLED = -1


@register
@dataclass(frozen=True)
class Graphs:
    """Nodes: logits (graphs, classes, nodes), labels (graphs, nodes), −1 of a node without.

    The loss is the mean cross-entropy of the nodes that have a class. For natural gradient it is
    taken for that of all nodes, whose logits have a distribution too.
    """

    name: ClassVar[str] = "graphs"
    likelihood: ClassVar[str] = "categorical_mean"
    adds_terms: ClassVar[bool] = True
    choices: ClassVar[tuple[str, ...]] = ("node_accuracy", "macro_f1", "accuracy", "loss")
    defaults: ClassVar[TaskDefaults] = TaskDefaults({}, "rgcn_tiny", "cross_entropy")
    augmentations: ClassVar[frozenset[str]] = frozenset({"repeats"})
    recipe: ClassVar[Path] = Path(__file__).parent / "recipe.yaml"

    def outputs(self, classes: int) -> int:
        """Return the number of classes."""
        return classes

    def targets(self, labels: Tensor, shares: Tensor) -> Tensor:
        """Return the labels (graphs, nodes).

        Raises:
            UsageError: The data has no classes of nodes.
        """
        if labels.ndim != 2 or labels.is_floating_point():
            raise UsageError(
                "the task graphs needs graphs with a class for each node: --data graphs-rules"
            )
        return labels

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean cross-entropy of each graph's labelled nodes, (graphs,).

        Raises:
            UsageError: The model has no logits for each node.
        """
        if outputs.ndim != 3 or outputs.shape[2] != targets.shape[1]:
            raise UsageError(
                "the task graphs needs a model with logits for each node, such as rgcn_tiny; this "
                f"one's outputs are {tuple(outputs.shape)}"
            )
        each = F.cross_entropy(outputs.float(), targets, reduction="none", ignore_index=UNLABELLED)
        return each.sum(dim=1) / (targets != UNLABELLED).sum(dim=1).clamp(min=1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean loss over graphs."""
        return self.losses(outputs, targets).mean()

    def right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mark the graphs whose labelled nodes are all right, and one at least, (graphs,)."""
        found = ((outputs.argmax(dim=1) == targets) | (targets == UNLABELLED)).all(dim=1)
        return found & self.judged(targets)

    def judged(self, targets: Tensor) -> Tensor:
        """Mark the graphs with a labelled node, (graphs,)."""
        return (targets != UNLABELLED).any(dim=1)

    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Compute loss, and shares of right graphs and nodes, and F1 as a mean over classes."""
        logits, wanted = labelled(outputs, labels)
        found = logits.argmax(dim=1)
        return {
            "loss": self.loss(outputs, labels).item(),
            "accuracy": share_of(self.right(outputs, labels), self.judged(labels)),
            "node_accuracy": share_of(outputs.argmax(dim=1) == labels, labels != UNLABELLED),
            "macro_f1": macro_f1(found, wanted, outputs.shape[1]),
        }

    def rank(self, scores: Mapping[str, float]) -> tuple[float, ...]:
        """Rank by right nodes, then by loss."""
        return scores["node_accuracy"], -scores["loss"]

    def decode(
        self, outputs: Tensor, classes: Sequence[str], settings: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Decode classes; see ``smallfry_runtime.decoders.graphs``."""
        return decoder.decode(outputs.detach().float().cpu().numpy(), classes, settings)

    def draw(self, outputs: Tensor, split: Split, classes: Sequence[str], folder: Path) -> None:
        """Draw the confusion matrix, and the graph with the greatest loss."""
        from smallfry.kits.graphs.pictures import draw_graph
        from smallfry.report.classification import confusion_matrix

        logits, labels = labelled(outputs, split.labels)
        confusion_matrix(logits, labels, classes, folder / "confusion_matrix.png")
        worst = self.losses(outputs, split.labels).argmax()[None]
        shown = split.take(worst)
        found = outputs[worst].argmax(dim=1)
        draw_graph(shown.images[0], shown.labels[0], found[0], classes, folder / "graph.png")


def labelled(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits (nodes, classes) and labels (nodes,) of the nodes that have one."""
    kept = labels != UNLABELLED
    return outputs.transpose(1, 2)[kept], labels[kept]
