"""Space of training configurations: settings in a YAML file, and choices by dotted name.

    settings: {model: {name: vitrm_micro_patch4_8}, epochs: 10}
    choices:
      model.options.embed_dim: [32, 48, 64]
      optimizer.name: [sgd, adamw]
      optimizer.lr: {low: 0.001, high: 0.1, log: true}
      optimizer.options.momentum: {values: [0.8, 0.9], when: {optimizer.name: [sgd]}}

Choices of the model are the architecture, on which costs depend; all others are the recipe.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from smallfry.costing import macs
from smallfry.data import ImageData
from smallfry.errors import SmallfryError, UsageError
from smallfry.io.safe_yaml import MOST_CONFIG, load_yaml
from smallfry.search.space import Candidate, Choice, encode, key_of
from smallfry.tasks import create_task
from smallfry.training.config import DataConfig, TrainConfig, config_of
from smallfry.training.model_source import create_model
from smallfry.training.training_data import load_training_data
from smallfry.transforms.spec import ModelSpec
from smallfry_runtime.files import read_bytes

__all__ = ["SettingsSpace", "read_settings_space"]

ARCHITECTURE = "model"
TASK = "classification"
OF_CHOICES = ("values", "low", "high", "log", "whole", "when")


class SettingsSpace:
    """Space of training configurations, by some of their settings.

    Args:
        settings: Settings of ``TrainConfig`` that all candidates share, groups as mappings.
        choices: Named as settings, with dots, each after those in its condition.
        where: Origin, for errors.

    Raises:
        UsageError: No choices, or settings that a search can't have.
        RunError: Settings that are not of this version.

    Example:
        >>> space = SettingsSpace({"epochs": 3}, [Choice("optimizer.lr", (0.1, 0.01))])
        >>> space.train({"optimizer.lr": 0.01}).optimizer.lr
        0.01
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        choices: Sequence[Choice],
        where: str | Path = "space",
    ) -> None:
        if not choices:
            raise UsageError(f"{where}: a space needs choices")
        self.settings, self.choices, self.where = dict(settings), tuple(choices), where
        if images := [c.name for c in choices if c.name.split(".")[0] == "data"]:
            raise UsageError(
                f"{where}: {images[0]} can't be a choice, as candidates are compared on the same "
                "images; give it with the data of the search"
            )
        self.architecture = tuple(c for c in choices if c.name.split(".")[0] == ARCHITECTURE)
        self.recipe = tuple(c for c in choices if c not in self.architecture)
        known: set[str] = set()
        for choice in (*self.architecture, *self.recipe):
            if foreign := [each for each in choice.when if each not in known]:
                raise UsageError(
                    f"{where}: {choice.name} depends on {foreign[0]}, which is no choice before "
                    "it; those of the model come first"
                )
            known.add(choice.name)
        self.base = config_of(self.settings, where)
        if self.base.task != TASK or self.base.select_on != "validation":
            raise UsageError(
                f"{where}: a search needs the task {TASK} and select_on validation, not "
                f"{self.base.task} and {self.base.select_on}"
            )
        self._models: dict[Any, tuple[ModelSpec, Mapping[str, float]] | SmallfryError] = {}

    def train(self, candidate: Candidate) -> TrainConfig:
        """Return the training of a candidate.

        Raises:
            RunError: Values that are no settings.
        """
        content = self.settings
        for name, value in candidate.items():
            content = _with(content, name.split("."), value)
        return config_of(content, f"{self.where}, {dict(candidate)}")

    def spec(self, candidate: Candidate) -> ModelSpec:
        """Return the model of a candidate, with the data's classes and size."""
        return self._model(candidate)[0]

    def costs(self, candidate: Candidate) -> Mapping[str, float]:
        """Return the multiply-accumulates for one image, and the parameters.

        Raises:
            UsageError: The model can't be built for the images.
            RunError: Values that are no settings.
        """
        return self._model(candidate)[1]

    def encode(self, candidate: Candidate) -> NDArray[np.float32]:
        """Encode a candidate for a predictor, (numbers,)."""
        return encode(self.choices, candidate)

    def with_data(self, data: DataConfig) -> "SettingsSpace":
        """Return the same space for other data."""
        content = replace(self.base, data=data).to_dict()["data"]
        return SettingsSpace({**self.settings, "data": content}, self.choices, self.where)

    def _model(self, candidate: Candidate) -> tuple[ModelSpec, Mapping[str, float]]:
        """Build an untrained model, or fail to, once for each architecture."""
        names = {choice.name for choice in self.architecture}
        part = {name: value for name, value in candidate.items() if name in names}
        key = key_of(part)
        if key not in self._models:
            try:
                self._models[key] = self._built(part)
            except SmallfryError as error:
                self._models[key] = error
        found = self._models[key]
        if isinstance(found, SmallfryError):
            raise found
        return found

    def _built(self, architecture: Candidate) -> tuple[ModelSpec, Mapping[str, float]]:
        config = self.train(architecture).model
        with torch.random.fork_rng():
            model, spec = create_model(config, self.data, create_task(TASK))
        image = torch.zeros(1, *self.data.input_shape)
        parameters = sum(each.numel() for each in model.parameters())
        return spec, {"macs": float(macs(model, image)), "parameters": float(parameters)}

    @cached_property
    def data(self) -> ImageData:
        """Data of all candidates, loaded once.

        Raises:
            UsageError: An unknown name, or settings that do not fit the data.
            DataError: It can't be used.
        """
        return load_training_data(self.base)


def read_settings_space(file: Path) -> SettingsSpace:
    """Read a space from an untrusted YAML file.

    Raises:
        UsageError: Not a space.
        RunError: Its settings are not of this version.
    """
    try:
        content = load_yaml(read_bytes(file, MOST_CONFIG).decode())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{file}: can't be read as YAML ({error})") from error
    if not isinstance(content, dict) or not {*content} <= {"settings", "choices"}:
        raise UsageError(f"{file}: a space has the entries settings and choices")
    choices = content.get("choices")
    if not isinstance(choices, dict):
        raise UsageError(f"{file}: choices are values or ranges by the names of settings")
    settings = content.get("settings") or {}
    if not isinstance(settings, dict):
        raise UsageError(f"{file}: settings are values by name, not {settings!r}")
    found = [_choice(str(name), given, file) for name, given in choices.items()]
    return SettingsSpace(settings, found, file)


def _choice(name: str, given: Any, file: Path) -> Choice:
    settings = given if isinstance(given, dict) else {"values": given}
    if unknown := {*settings} - {*OF_CHOICES}:
        raise UsageError(
            f"{file}: choice {name} has no '{min(unknown)}'; it has {', '.join(OF_CHOICES)}"
        )
    values = settings.get("values", ())
    if not isinstance(values, list | tuple):
        raise UsageError(f"{file}: choice {name} needs a list of values, or low and high")
    try:
        return Choice(name, **{**settings, "values": tuple(values)})
    except TypeError as error:
        raise UsageError(f"{file}: choice {name}: {error}") from error


def _with(content: Mapping[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """Return nested settings with one replaced."""
    head, *rest = path
    inner = content.get(head)
    new = _with(inner if isinstance(inner, dict) else {}, rest, value) if rest else value
    return {**content, head: new}
