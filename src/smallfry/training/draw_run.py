"""Plots of a finished run."""

from smallfry.data import Split
from smallfry.models import LatentRecursive, Recursive
from smallfry.models.trace import steps_to_follow, trace_recursion
from smallfry.tasks import Explained, Pictured
from smallfry.training.evaluation import Predictions, task_of
from smallfry.training.run import RunFolder, TrainedModel


def draw_run(
    folder: RunFolder,
    history: list[dict[str, float]],
    trained: TrainedModel,
    split: Split,
    predictions: Predictions,
) -> None:
    """Draw all plots of a run into its folder."""
    from smallfry.report.curves import learning_curves  # here, as matplotlib is slow to import
    from smallfry.report.recursion import interesting, recursion_trace

    logits, labels, classes = predictions.logits, predictions.labels, trained.classes
    pictures, task = folder.pictures, task_of(trained.manifest)
    pictures.mkdir(exist_ok=True)
    learning_curves(history, pictures / "learning_curves.png")
    if not isinstance(task, Pictured):
        return
    task.draw(logits, split, classes, pictures)
    if isinstance(task, Explained):
        task.explain(trained.model, split, trained.normalize, classes, pictures)
    if isinstance(trained.model, Recursive) and labels.ndim == 1:  # one prediction an image
        shown, model = split.take(interesting(logits, labels)), trained.model
        trained.model.cpu()
        recursion_trace(
            trace_recursion(model, trained.normalize(shown.images), steps_to_follow(model)),
            shown.images,
            shown.labels,
            classes,
            pictures / "recursion_trace.png",
            latent_steps=model.latent_steps if isinstance(model, LatentRecursive) else None,
            recursion_steps=model.recursion_steps,
        )
