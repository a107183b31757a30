"""Completion scripts: what shells offer, against the parsers themselves."""

import shutil
import subprocess
from typing import Literal

import pytest

from smallfry.cli import main
from smallfry.cli._completion import SHELLS, commands, script, values_of
from smallfry.cli._parser import read
from smallfry.cli._verbs import verb_names

ENDINGS = {"bash": "-F _smallfry smallfry", "zsh": "-F _smallfry smallfry", "fish": "'"}


@pytest.fixture(scope="module")
def offered(tmp_path_factory):
    """What bash offers for the last of some words."""
    file = tmp_path_factory.mktemp("completion") / "smallfry.bash"
    file.write_text(script("bash"))

    def offer(*words):
        here = 'source "$1"; shift; COMP_WORDS=(smallfry "$@"); COMP_CWORD=$#; _smallfry'
        here += '; printf "%s\\n" "${COMPREPLY[@]}"'
        done = subprocess.run(
            ["bash", "-c", here, "bash", str(file), *words], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.split()

    return offer


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


@needs_bash
def test_bash_offers_verbs_options_and_values(offered):
    assert offered("") == verb_names()
    assert offered("tra") == ["train"]
    assert offered("train", "--optimizer.l") == ["--optimizer.layer_decay", "--optimizer.lr"]
    assert offered("train", "--select_on", "") == ["validation", "test"]
    assert offered("train", "--epochs", "3", "--select_on", "t") == ["test"]
    assert offered("train", "--compile", "") == ["true", "false"]
    assert offered("completion", "") == list(SHELLS)
    assert {"--data", "--pretrained", "--find_lr", "--code"} <= {*offered("train", "--")}
    assert offered("evaluate", "--split", "v") == ["validation"]
    assert offered("evaluate", "runs/") == []  # files, which bash offers then
    assert offered("nothing", "--") == []


@needs_bash
def test_bash_offers_subcommands_with_their_own_options(offered):
    studies = offered("study", "")
    assert studies == [words[1] for words in commands() if words[0] == "study"]
    assert len(studies) > 3
    for study in studies:
        assert "--folder" in offered("study", study, "--f")
    assert offered("study", "batch-size", "--select_on", "") == ["validation", "test"]


def test_every_option_is_one_of_the_parser():
    for options in commands().values():
        names = [option.name for option in options]
        assert "--help" in names
        assert len({*names}) == len(names)
    train = {option.name: option for option in commands()[("train",)]}
    assert train["--data"].help == train["--data.name"].help != ""
    assert train["--debug"].is_flag
    assert not train["--epochs"].is_flag
    assert train["--strategy"].values == ("auto", "ddp", "fsdp")
    for option in ("--strategy", "--progress", "--select_on"):
        for value in train[option].values:
            settings = read(["train", option, value]).options.settings
            assert getattr(settings, option[2:]) == value


def test_values_are_those_of_a_type():
    assert values_of(bool | None) == ("true", "false")
    assert values_of(Literal["a", "b"]) == ("a", "b")
    assert values_of(Literal["a"] | None) == ("a",)
    for kind in (int, str | None, list[bool], bool | int, None):
        assert values_of(kind) == ()


@pytest.mark.parametrize("shell", SHELLS)
def test_the_command_prints_a_script(shell, capsys, tmp_path):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert text == script(shell) + "\n"
    assert text.rstrip().endswith(ENDINGS[shell])
    assert "\x1b" not in text
    if shutil.which(shell) is not None:
        (tmp_path / "script").write_text(text)
        done = subprocess.run([shell, "-n", tmp_path / "script"], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_fish_has_all_options_with_their_help():
    lines = script("fish").splitlines()
    for words, options in commands().items():
        for option in options:
            mine = [line for line in lines if f" -l {option.name[2:]} " in line]
            assert any(all(word in line for word in words) for line in mine), option.name
    (device,) = [line for line in lines if "from train' -l device " in line]
    assert device.endswith("-r -d 'auto, cpu, cuda or mps, or one of several GPUs, such as cuda:1'")
    (strategy,) = [line for line in lines if "from train' -l strategy " in line]
    assert " -r -f -a 'auto ddp fsdp' " in strategy
    for line in lines:
        assert line.replace("\\'", "").count("'") % 2 == 0


@pytest.mark.parametrize("words", [[], ["tcsh"]])
def test_another_shell_is_refused(words, capsys):
    assert main(["completion", *words]) == 2
    assert "bash, zsh" in capsys.readouterr().err
