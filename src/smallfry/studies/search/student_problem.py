"""Students of a trained model as the space of a search; each is distilled from its teacher."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from smallfry.errors import RunError, UsageError
from smallfry.search.n2n import Layer, reward
from smallfry.search.n2n.layer import choices_of
from smallfry.search.n2n.students import Students
from smallfry.search.space import Candidate, Choice, Trial, key_of
from smallfry.studies.search.problem import run_name, seed_of, train_all
from smallfry.training.checkpoint import has_checkpoint
from smallfry.training.config import TrainConfig, read_config
from smallfry.training.distillation_config import DistillationConfig
from smallfry.training.evaluation_data import require_place
from smallfry.training.run import RunFolder, load_run
from smallfry.training.training_data import load_training_data

__all__ = ["STARTS", "StudentProblem"]

EXAMPLES = 2
STARTS = "students"  # folder of the students before their training


class StudentProblem:
    """Smaller students of a run's model, valued by N2N's reward in percent.

    Args:
        teacher: Run folder of a classifier.
        folder: Folder of the search.
        epochs: Of each student.
        workers: Processes, each of which trains a student.

    Raises:
        UsageError: The run has no validation scores, or a model without students.
        RunError: It can't be read.
        DataError: Its data, which students learn from, can't be used any more.
    """

    measure = "reward"

    def __init__(self, teacher: Path, folder: Path, epochs: int = 5, workers: int = 1) -> None:
        self.teacher, self.folder, self.workers = teacher.resolve(), folder, workers
        self.trained = load_run(teacher)
        scores = self.trained.manifest.get("training", {}).get("scores", {})
        if not self.trained.is_classifier or not scores.get("accuracy"):
            raise UsageError(
                f"{teacher}: a teacher is a classifier with scores on validation images; train it "
                "by smallfry train"
            )
        self.accuracy: float = 100 * scores["accuracy"]
        shape = (EXAMPLES, *self.trained.input_shape)
        noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        self.students = Students(self.trained.model, self.trained.spec, noise)
        self.layers: tuple[Layer, ...] = self.students.layers
        self.architecture: tuple[Choice, ...] = choices_of(self.layers)
        self.recipe: tuple[Choice, ...] = ()
        self.text = yaml.safe_dump(
            {
                "teacher": str(self.teacher),
                "epochs": epochs,
                "choices": {choice.name: list(choice.values) for choice in self.architecture},
            },
            sort_keys=False,
            allow_unicode=True,
        )
        base = read_config(RunFolder(self.teacher).config)
        require_place(base.data, f"its students learn from it: train {teacher} on its new place")
        load_training_data(base)  # as no student can be trained without it
        self._base = replace(
            base,
            model=type(base.model)(),
            methods=[],
            objective=type(base.objective)(),
            distillation=DistillationConfig(teacher=str(self.teacher), weight=1.0),
            references=False,
        )
        self._short = replace(self._base, epochs=epochs)
        self._costs: dict[object, Mapping[str, float]] = {}
        self._whole = self.costs({layer.name: 1.0 for layer in self.layers})["parameters"]

    def costs(self, candidate: Candidate) -> Mapping[str, float]:
        """Return macs and parameters.

        Raises:
            UsageError: Nothing between inputs and outputs is left.
        """
        key = key_of(candidate)
        if key not in self._costs:
            self._costs[key] = self.students.costs(candidate)
        return self._costs[key]

    def reward(self, trial: Trial) -> float:
        """Return the reward of a trial."""
        assert trial.value is not None
        return trial.value / 100

    def config(self, candidate: Candidate) -> TrainConfig:
        """Return a training of a student as long as the teacher's."""
        return self._config(self._base, candidate)

    def evaluate(self, candidates: Sequence[Candidate], folder: Path, seed: int) -> Iterator[Trial]:
        """Yield the trials of students as they end; runs are folders in ``folder``."""
        jobs = []
        for each in candidates:
            self._write(each)
            run = folder / run_name(each)
            config = replace(self._config(self._short, each), run=run, seed=seed_of(each, seed))
            jobs.append((each, config, self.costs(each)))
        for trial in train_all(jobs, self.workers):
            if trial.value is None:
                yield trial
                continue
            compression = 1 - trial.cost["parameters"] / self._whole
            value = reward(compression, 100 * trial.measured["accuracy"] / self.accuracy)
            yield replace(trial, value=100 * value)

    def _config(self, base: TrainConfig, candidate: Candidate) -> TrainConfig:
        start = str((self.folder / STARTS / run_name(candidate)).resolve())
        return replace(base, model=replace(base.model, start=start))

    def _write(self, candidate: Candidate) -> None:
        """Write a student with the teacher's weights, which its training starts from."""
        place = self.folder / STARTS / run_name(candidate)
        if has_checkpoint(RunFolder(place).best):
            return
        shutil.rmtree(place, ignore_errors=True)  # of a search that was stopped as it wrote it
        student = self.students.build(candidate)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.trained.compressed(student.model, student.spec, ()).save(place)
        except OSError as error:
            raise RunError(f"{place} can't be written ({error})") from error
