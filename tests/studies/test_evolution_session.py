"""Evolutions in their folder: their end at any moment, and the command."""

import json

import pytest

from smallfry.__main__ import main
from smallfry.errors import RunError, UsageError
from smallfry.search.neuroevolution import DeepGA, SeedChain
from smallfry.studies.evolution import evolve
from smallfry.studies.evolution_config import EvolutionConfig

SMALL = EvolutionConfig("digits", generations=6, population=12, parents=3)


def test_a_stopped_evolution_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    whole = evolve(SMALL, tmp_path / "whole", quiet=True)
    assert len(whole.generations) == 6
    assert not whole.solved
    after = DeepGA._next

    def interrupted(self, history):
        if len(history) == 4:
            raise KeyboardInterrupt
        return after(self, history)

    with monkeypatch.context() as patched:
        patched.setattr(DeepGA, "_next", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evolve(SMALL, tmp_path / "stopped", quiet=True)
    assert not (tmp_path / "stopped" / "elite.json").exists()
    again = evolve(SMALL, tmp_path / "stopped", quiet=True)
    assert again.generations == whole.generations
    assert again.accuracy == whole.accuracy
    for name in ("generations.jsonl", "elite.json", "evolution.json"):
        texts = [(tmp_path / each / name).read_text() for each in ("whole", "stopped")]
        assert texts[0] == texts[1]


def test_more_generations_continue_an_ended_evolution(tmp_path):
    few = EvolutionConfig("digits", generations=2, population=12, parents=3)
    evolve(few, tmp_path, quiet=True)
    assert evolve(SMALL, tmp_path, quiet=True).generations[1].number == 1
    chain = SeedChain.load(tmp_path / "elite.json")
    assert chain.sizes == (64, 32, 10)


def test_other_settings_and_foreign_folders_are_refused(tmp_path):
    evolve(SMALL, tmp_path / "a", quiet=True)
    other = EvolutionConfig("digits", generations=6, population=13, parents=3)
    with pytest.raises(UsageError, match="an evolution with population 12, not 13"):
        evolve(other, tmp_path / "a", quiet=True)
    (tmp_path / "a" / "evolution.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        evolve(SMALL, tmp_path / "a", quiet=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "letter.txt").touch()
    with pytest.raises(RunError, match=r"it holds letter\.txt"):
        evolve(SMALL, tmp_path / "b", quiet=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generations": 0}, "generations must be at least 1"),
        ({"parents": 300}, "parents are 1 to 200"),
        ({"seed": -1}, "seed is 0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        EvolutionConfig(**settings)


def test_the_command_prints_the_result_and_json(tmp_path, capsys):
    arguments = ["evolve", "--problem", "digits", "--generations", "3", "--population", "10"]
    arguments += ["--parents", "2"]
    assert main([*arguments, "--to", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "% of validation images after 3 generations, 30 evaluations" in out
    assert main([*arguments, "--to", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["evaluations"] == 30
    assert found["fitness"] < 0
    assert main(arguments) == 2
    assert "an evolution needs a folder: --to DIR" in capsys.readouterr().err
    maze = ["evolve", "--select", "random", "--generations", "1", "--population", "4"]
    assert main([*maze, "--parents", "1", "--to", str(tmp_path / "maze")]) == 0
    assert "not solved after 1 generations" in capsys.readouterr().out
