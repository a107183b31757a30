"""The model card: it says what the run says, no more, and nothing of the machine it comes from."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import example, given
from hypothesis import strategies as st

from smallfry.cli import main
from smallfry.deploy.model_card import (
    LONGEST,
    as_code,
    as_text,
    model_card,
    plain,
    wilson_interval,
)
from smallfry.deploy.pretrained import save_pretrained
from smallfry.deploy.run_metadata import without_paths
from smallfry.models.sources import is_ours

OPTIONS = (
    "--model.options={embed_dim: 16, num_heads: 2, mlp_hidden_dim: 16, depth: 1, latent_steps: 1}"
)
HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "a | b",
    "`rm -rf`",
    "[free](https://example.org)",
    "# title",
    "---",
    "two\nlines",
    "https://example.org",
    "*all*",
    "\u202egnp.tac",
    "\udcff",
    "yes: {no}",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secret place") / "run"
    arguments = [OPTIONS, "--model.recursion_steps=4", "--epochs=1", "--data.limit=200"]
    assert main(["train", *arguments, "--progress=quiet", "--run", str(folder)]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    words = ["train", "--data", "digits", "--run", str(folder), "--model.options={depth: 1}"]
    summary["provenance"]["command"] = shlex.join(words)
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module")
def summary(run):
    return json.loads((run / "summary.json").read_text())


@pytest.fixture(scope="module")
def shared(run, tmp_path_factory):
    place = tmp_path_factory.mktemp("shared") / "digits"
    return save_pretrained(run, place, license="MIT", repository="ann/digits-vitrm")


@pytest.fixture
def config(shared):
    return json.loads((shared / "config.json").read_text())


def body(card):
    return card.partition("\n---\n")[2]


def test_the_front_matter_is_what_the_hub_reads(shared, summary):
    card = ModelCard.load(shared / "README.md")
    assert card.data.license == "mit"
    assert card.data.library_name == "smallfry"
    assert card.data.pipeline_tag == "image-classification"
    assert {"timm", "smallfry"} <= set(card.data.tags)
    assert card.data.model_name == "digits-vitrm"
    figures = {result.metric_type: result for result in card.data.eval_results}
    test = summary["measured"]["test"]
    assert figures["accuracy"].metric_value == pytest.approx(test["accuracy"], abs=1e-6)
    assert figures["f1"].metric_value == pytest.approx(test["macro_f1"], abs=1e-6)
    assert figures["accuracy"].dataset_name == "digits"
    assert figures["accuracy"].dataset_split == "test"


def test_it_tells_the_figures_of_the_summary(shared, summary):
    text = (shared / "README.md").read_text()
    measured = summary["measured"]
    for told in (
        f"{measured['test']['accuracy']:.2%}",
        f"{measured['test']['macro_f1']:.2%}",
        f"{measured['test']['calibration_error']:.4f}",
        f"{measured['parameters']:,}",
        f"{measured['macs'] / 1e6:,.1f} million",
        f"{measured['references'][0]['test_accuracy']:.2%}",
        "200 images to train, 143 to validate, 359 to test",
        '"recursion_steps": 4',
        "chosen on | the validation split",
        summary["provenance"]["date"],
        summary["provenance"]["versions"]["torch"],
        "seed 0",
        "![Confusion matrix of the test split](confusion_matrix.png)",
    ):
        assert told in text, told


def test_nothing_of_the_machine_is_told(run, shared):
    secret = {*run.parts, "secret"} - {"/", "run", "tmp"}
    for file in ("README.md", "config.json"):
        text = (shared / file).read_text()
        assert not [part for part in secret if part in text], file
        assert str(Path.home()) not in text
    assert "--run run" in (shared / "README.md").read_text()


def test_a_run_on_a_folder_tells_its_name_alone(tmp_path, run):
    """The configuration holds the folder's whole path, and so does the command."""
    other = Path(shutil.copytree(run, tmp_path / "r"))
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("name: digits", "name: /home/ann/pets"))
    out = save_pretrained(other, tmp_path / "out")
    assert "ann" not in re.sub("annot|channel", "", (out / "config.json").read_text())
    assert "hub" not in json.loads((out / "config.json").read_text())["smallfry"]["data"]


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_a_data_set_of_the_hub_is_linked(config, name):
    data = {"name": name, "hub": f"owner/{name}"}
    card = model_card(config | {"smallfry": config["smallfry"] | {"data": data}}, "hf_hub:a/b")
    assert f"(https://huggingface.co/datasets/owner/{name})" in card
    assert ModelCard(card).data.datasets == [f"owner/{name}"]
    data["hub"] = "x) [free](https://example.org"
    card = model_card(config | {"smallfry": config["smallfry"] | {"data": data}}, "hf_hub:a/b")
    assert "(https://example.org" not in card
    assert ModelCard(card).data.datasets is None


def test_a_licence_is_never_made_up(run, tmp_path):
    text = (save_pretrained(run, tmp_path / "out") / "README.md").read_text()
    assert "license" not in yaml.safe_load(text.split("---\n")[1])
    assert "license | not stated" in text
    assert "No license is stated" in text


def test_choosing_on_the_test_split_is_owned_up_to(config):
    assert "flatters" not in model_card(config, "hf_hub:a/b")
    config["smallfry"]["measured"]["select_on"] = "test"
    assert "flatters" in model_card(config, "hf_hub:a/b")


def test_better_references_are_owned_up_to(config):
    measured = config["smallfry"]["measured"]
    measured["test"]["accuracy"] = 0.97
    measured["references"] = [
        {"name": "RBF support vector machine", "test_accuracy": 0.98},
        {"name": "logistic regression", "test_accuracy": 0.96},
    ]
    limits = model_card(config, "hf_hub:a/b").partition("## Limits")[2]
    assert "right more often: RBF support vector machine (98.00%)" in limits
    assert "logistic" not in limits


def test_an_architecture_of_timm_needs_no_import(config):
    ours = model_card(config, "hf_hub:a/b")
    assert "import smallfry" in ours
    theirs = model_card(config | {"architecture": "resnet10t"}, "hf_hub:a/b")
    assert "import smallfry" not in theirs
    assert ModelCard(theirs).data.library_name == "timm"
    assert is_ours("paper_resnet18_32")


def test_what_is_not_finite_is_said_to_be_so(config):
    config["smallfry"]["measured"]["test"] |= {"loss": None, "calibration_error": None}
    assert model_card(config, "hf_hub:a/b").count("not finite") == 2


def test_many_classes_are_not_all_listed(config):
    labels = [f"class{number}" for number in range(250)]
    card = model_card(config | {"label_names": labels}, "hf_hub:a/b")
    assert "class99, and 150 more in `config.json`" in card
    assert "class100" not in card


# Names from strangers' folders


def test_hostile_names_are_shown_and_do_nothing(config):
    data = config["smallfry"]["data"] | {"name": HOSTILE[0] + "\n---\nlicense: x"}
    config |= {"label_names": HOSTILE, "smallfry": config["smallfry"] | {"data": data}}
    card = model_card(config, "local-dir:" + 'it\'s `a` "dir"\n```\n# gotcha')
    front = ModelCard(card).data.to_dict()
    assert front["license"] == "mit"
    assert front["model-index"][0]["results"][0]["dataset"]["name"].startswith("<img src=x")
    text = body(card)
    assert not re.search(r"(?<!\\)<img", text)
    assert "](https" not in text.replace(r"\]\(", "")
    assert "\n# gotcha" not in text
    assert text.count("\n```") == 4  # two blocks, each opened and closed
    card.encode()  # no lone surrogate is left
    assert "\u202e" not in card


@given(st.text(max_size=200))
@example("\u2028|\x00\udc80")
def test_text_is_one_line_without_live_markdown(name):
    shown = as_text(name)
    shown.encode()
    assert len(shown.splitlines()) <= 1
    assert not re.search(r"(?<!\\)(?:\\\\)*[<>\[\]()*_`|#&!~:@/]", shown)
    assert len(plain(name)) <= LONGEST
    printable = "".join(name.split())
    if printable.isascii() and printable.isprintable() and len(name) <= LONGEST:
        assert re.sub(r"\\(.)", r"\1", shown) == " ".join(name.split())


@given(st.text(alphabet="`|a \n<", min_size=1, max_size=30))
def test_code_can_not_be_left(value):
    shown = as_code(value)
    fence = re.match("`+", shown)[0]
    inner = shown[len(fence) : -len(fence)]
    assert shown.endswith(fence)
    assert fence not in re.findall("`+", inner)
    assert not re.search(r"(?<!\\)\|", inner)


# What a command line tells


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("smallfry train", "smallfry train"),
        ("train --data /home/ann/pets --run runs/x/", "train --data pets --run x"),
        ("train --data=/home/ann/pets", "train --data=pets"),
        ("train --data '/home/ann/my pets'", "train --data 'my pets'"),
        ("train --config recipes/a.yaml --epochs=3", "train --config a.yaml --epochs=3"),
        (r"train --data 'C:\Users\ann\pets'", "train --data pets"),
        ("train -d/home/ann/pets", "train pets"),
        ("train '--model.options={depth: 1}'", "train '--model.options={depth: 1}'"),
        (
            "train '--model.options={weights: [/home/ann b/w.bin], depth: 1}'",
            "train '--model.options={depth: 1, weights: [w.bin]}'",
        ),
        ("train '--model.options={/home/ann: '", "train '--model.options=…'"),
        ("train 'unfinished /home/ann", ""),
    ],
)
def test_a_command_is_told_without_folders(command, told):
    assert without_paths(command) == told


@given(st.lists(st.sampled_from(["/home/ann/x", "--a=/home/ann/x", "{b: /home/ann/x}", "y z"])))
def test_no_folder_is_left_in_a_command(words):
    assert "ann" not in without_paths(shlex.join(words))


# Figures


def test_the_interval_is_wilsons():
    low, high = wilson_interval(0.9, 100)  # Agresti and Coull 1998 give the formula
    assert (low, high) == pytest.approx((0.8256, 0.9448), abs=1e-4)
    assert wilson_interval(1.0, 359)[1] == 1.0
    assert wilson_interval(0.0, 359)[0] == 0.0
    assert wilson_interval(1.0, 359)[0] < 1.0


def test_a_model_without_a_run_says_that_nothing_is_known(config):
    costs = ("parameters", "macs", "weight_bytes", "activation_bytes")
    measured = {name: config["smallfry"]["measured"][name] for name in costs}
    kept = {"format": 1, "version": "0.1.0", "measured": measured}
    card = model_card(config | {"smallfry": kept}, "hf_hub:a/b")
    assert "What it was trained on is not recorded" in card
    assert "None on a test split" in card
    assert ModelCard(card).data.eval_results is None
