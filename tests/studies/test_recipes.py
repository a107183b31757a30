"""The recipes of the paper and their short forms, as files."""

import runpy
from pathlib import Path

import pytest

from smallfry.studies.config import BatchSizeConfig
from smallfry.studies.recipes import BATCH_SIZES, PAPER_DATA, paper_recipe, recipe
from smallfry.studies.study_models import PAPER, STUDY_MODELS
from smallfry.training.config import DataConfig, TrainConfig, read_config

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def generated() -> dict:
    return runpy.run_path(str(RECIPES / "generate.py"))


def test_committed_recipes_are_the_generated_ones(generated: dict) -> None:
    texts = generated["recipes"]()
    committed = {
        f"{folder}/{file.name}": file.read_text()
        for folder in ("paper", "short")
        for file in (RECIPES / folder).glob("*.yaml")
    }
    assert committed == texts, "make recipes"
    assert len([path for path in texts if path.startswith("paper/")]) == 70


@pytest.mark.parametrize("name", ["vitrm_small", "resnet50"])
def test_a_recipe_says_all_that_its_configuration_does(name: str) -> None:
    for data in PAPER_DATA:
        for size in BATCH_SIZES[::2]:
            found = read_config(RECIPES / f"paper/{name}_{data}_b{size}.yaml")
            assert found.to_dict() == paper_recipe(STUDY_MODELS[name], data, size).to_dict()


def test_every_recipe_is_a_configuration(generated: dict) -> None:
    for path in generated["recipes"]():
        if "_b128" in path or path.startswith("short"):
            assert isinstance(read_config(RECIPES / path), TrainConfig)


def test_short_recipes_say_what_they_are_generated_from(generated: dict) -> None:
    for name in generated["SHORT_EPOCHS"]:
        found = read_config(RECIPES / f"short/{name}_cifar10.yaml")
        assert found.to_dict() == generated["short_config"](name).to_dict()


def test_the_papers_recipe_is_the_one_written_before() -> None:
    for data in PAPER_DATA:
        by_hand = read_config(RECIPES / f"vitrm_small_{data}.yaml")
        assert paper_recipe(PAPER["vitrm_small"], data, 128).to_dict() == by_hand.to_dict()


def test_fewer_epochs_shorten_the_warm_up_in_proportion() -> None:
    told = recipe(PAPER["vit_small"], BatchSizeConfig(epochs=30), 64, seed=3)
    assert (told.epochs, told.schedule.warmup_epochs, told.seed) == (30, 1.0, 3)
    assert told.optimizer.lr == 3e-4


def test_other_data_than_cifar_takes_the_settings_of_smallfry_train() -> None:
    told = recipe(STUDY_MODELS["vit_micro"], BatchSizeConfig(data=DataConfig("digits")), 64)
    assert told.optimizer == TrainConfig().optimizer
    assert told.data.mean is None
