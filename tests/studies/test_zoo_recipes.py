"""The recipes of the zoo are configurations, and name the sources of what they report."""

from pathlib import Path

import pytest
import timm

import smallfry  # noqa: F401  # registers the models
from smallfry.training.config import read_config

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "zoo").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipe_is_a_configuration(recipe: Path) -> None:
    config = read_config(recipe)
    assert timm.is_model(config.model.name)
    assert f"--config recipes/zoo/{recipe.name}" in recipe.read_text()
    assert not config.reported or config.reported.keys() > {"source"}


def test_simplenets_reported_figures_are_the_honest_ones() -> None:
    reported = {r.stem: read_config(r).reported for r in RECIPES if "extra_pool" in r.stem}
    found = [each["last_test_epoch"] for each in reported.values()]
    assert found == [95.43, 78.24]
    assert all(r["best_test_epoch"]["accuracy"] > r["last_test_epoch"] for r in reported.values())
