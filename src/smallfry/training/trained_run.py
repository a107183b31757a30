"""Result of a training in Python: its summary, and the model."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

from markupsafe import Markup

from smallfry.training.export_settings import ExportSettings
from smallfry.training.run import TrainedModel, load_run
from smallfry_runtime.predictions import Answer

SHOWN = ("learning_curves.png", "confusion_matrix.png", "classes.png", "mistakes.png")


class TrainedRun(dict[str, Any]):
    """Summary of a run, with its best model.

    The keys are those of ``summary.json``. A notebook shows scores and pictures.

    Attributes:
        folder: The run folder, wherever the working directory moves.

    Example:
        >>> import smallfry
        >>> run = smallfry.train(data="photos", epochs=5)  # doctest: +SKIP
        >>> run.predict("new.jpg")[0].top  # doctest: +SKIP
    """

    def __init__(self, summary: Mapping[str, Any]) -> None:
        super().__init__(summary)
        self.folder = Path(self["run"]).absolute()

    @cached_property
    def model(self) -> TrainedModel:
        """Model of the best epoch."""
        return load_run(self.folder)

    def predict(self, images: Any, top_k: int = 3) -> list[Answer]:
        """Classify images; see ``TrainedModel.predict``."""
        return self.model.predict(images, top_k)

    def evaluate(self, data: Any = None, split: str = "test") -> dict[str, Any]:
        """Score the model; see ``TrainedModel.evaluate``."""
        return self.model.evaluate(data, split)

    def export(self, folder: str | Path, **settings: Unpack[ExportSettings]) -> Path:
        """Export the model to ONNX; see ``smallfry.export``."""
        return self.model.export(folder, **settings)

    def save(self, run: str | Path) -> Path:
        """Write the model into a run folder; see ``TrainedModel.save``."""
        return self.model.save(run)

    def _repr_html_(self) -> Markup:
        """Return scores and pictures for a notebook."""
        from smallfry.report.page import image, render
        from smallfry.report.table import number, table

        scores = self["measured"]["test"]
        rows = [[name.replace("_", " "), number(value)] for name, value in scores.items()]
        files = [self.folder / "pictures" / name for name in SHOWN]
        return render(
            "report/templates/result.html",
            title=f"{self['model']['name']} on {self['data']['name']}",
            scores=table(["test", ""], rows),
            pictures=[image(file, file.stem.replace("_", " ")) for file in files if file.is_file()],
        )
