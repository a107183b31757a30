"""The page of a race is whole and harmless, whatever is in the records."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from smallfry.io.json import strict
from smallfry.report.axes import log_ticks
from smallfry.report.race_page import write_report
from smallfry.report.race_pictures import looks, some, written
from smallfry.report.race_tables import settings, spread
from smallfry.report.races import Spread
from smallfry.report.table import number, table

pytestmark = pytest.mark.slow

HOSTILE = "<script>alert('$x_$')</script>"
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Tags that are open, and all that were."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], set(), [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def record(contestant, phase, losses, seed=0, **more):
    points = [
        {"step": 5 * i, "epoch": i / 4, "seconds": i * 0.5, "train": x, "validation": x}
        for i, x in enumerate(losses)
    ]
    measured = {"points": points, "diverged": not all(map(math.isfinite, losses)), "steps": 10}
    measured |= {"plain_ms": 1.0, "refresh_ms": None, "mean_ms": 1.5, "state_over_weights": 2.0}
    provenance = {"command": ["smallfry", "study"], "commit": "abc123", "device": "CPU & co"}
    provenance |= {"versions": {"torch": "2.11"}, "date": f"2026-01-0{seed + 1}"}
    return {
        "problem": "curves",
        "phase": phase,
        "contestant": contestant,
        "label": contestant.upper(),
        "family": "peer" if contestant == "adamw" else "ours",
        "settings": {"lr": 0.1},
        "seed": seed,
        "trial": seed,
        "seconds": 1.0,
        "clock": "cpu",
        "measured": measured,
        "provenance": provenance,
        **more,
    }


def fisher_record(contestant, layers=2):
    path = [{"step": 25 * i, "layers": {str(k): 0.1 * i for k in range(layers)}} for i in (1, 2)]
    return record(contestant, "fisher", []) | {"measured": {"points": path}}


@pytest.fixture(scope="module")
def study():
    records = []
    for contestant, end in (("kfac", 0.1), ("adamw", 0.2), ("sgd", math.nan)):
        for phase in ("tuning", "tuned", "defaults"):
            records += [record(contestant, phase, [1.0, 0.5, end], seed=s) for s in (0, 1)]
        records.append(fisher_record(contestant))
    return records


def numbers_of(file):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(file.read_text(), parse_constant=refuse)


def drawn(folder):
    names = sorted(file.name for file in folder.iterdir())
    for name in names:
        pixels = np.asarray(Image.open(folder / name).convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20, name
    return names


@pytest.mark.slow
def test_a_study_becomes_a_page_with_its_pictures_and_strict_numbers(tmp_path, study):
    file = write_report(study, tmp_path, "A race", {"KFAC": {"epochs": 20}, "HF": {"loss": 0.011}})
    assert file == tmp_path / "report.html"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pictures", "report.html", "summary.json"]
    names = drawn(tmp_path / "pictures")
    kinds = ("defaults-training", "defaults-validation", "fisher")
    kinds += ("tuned-training", "tuned-validation", "tuning")
    assert names == [f"1-curves-{kind}.png" for kind in kinds]
    page = Page(file.read_text())
    assert page.open == []
    sources = [value for name, value in page.attributes if name == "src"]
    assert len(sources) == len(names)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not {"script", "link", "iframe"} & page.tags
    for text in ("Reported by the papers", "CPU & co", "2026-01-01 to 2026-01-02", "abc123"):
        assert text in page.text
    found = numbers_of(tmp_path / "summary.json")["problems"]["curves"]
    assert [row["contestant"] for row in found["tuned"]["rows"]] == ["kfac", "adamw", "sgd"]
    assert found["tuned"]["rows"][0]["train"] == {"median": 0.1, "low": 0.1, "high": 0.1}
    assert found["tuned"]["rows"][2]["train"]["median"] is None
    assert found["tuned"]["rows"][2]["diverged"] == 2
    assert len(found["tuning"]) == 6
    assert [error["median"] for error in found["fisher"][:1]] == [pytest.approx(0.15)]


def test_reported_and_measured_figures_have_their_own_columns(tmp_path, study):
    file = write_report(study, tmp_path, "A race", {"KFAC": {"loss": 0.011}, "HF": {"loss": 0.5}})
    text = file.read_text()
    part = text[text.index("<h2>Reported") : text.index("<h2>Provenance")]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", part)
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]
    assert cells[0] == ["", "reported", "measured here: training loss"]
    assert cells[1] == ["", "loss", "curves, tuned", "curves, defaults"]
    assert cells[2] == ["KFAC", "0.011", "0.1000", "0.1000"]
    assert cells[3] == ["HF", "0.5", "–", "–"]


def test_hostile_names_stay_text(tmp_path):
    records = [
        record("kfac", phase, [1.0, 0.5, 0.1])
        | {"contestant": HOSTILE, "label": HOSTILE, "problem": f"../../{HOSTILE}"}
        | {"settings": {HOSTILE: HOSTILE}, "clock": HOSTILE}
        | {"provenance": {"command": HOSTILE, "versions": {HOSTILE: HOSTILE}, "date": HOSTILE}}
        for phase in ("tuning", "tuned", "defaults")
    ]
    file = write_report(records, tmp_path / "study", HOSTILE, {HOSTILE: {HOSTILE: HOSTILE}})
    page = Page(file.read_text())
    assert page.open == []
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) > 15
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert [p.name for p in tmp_path.iterdir()] == ["study"]
    assert len(drawn(tmp_path / "study" / "pictures")) == 5


def test_runs_that_cannot_be_compared_are_named(tmp_path):
    budgets = ((0, 1.0, "cpu"), (1, 2.0, "wall"))
    records = [
        record("kfac", phase, [1.0, 0.5], seed=seed, seconds=seconds, clock=clock)
        for seed, seconds, clock in budgets
        for phase in ("tuned", "tuning")
    ]
    text = " ".join(write_report(records, tmp_path, "Odd").read_text().split())
    assert "Every run had 1 or 2 seconds of CPU time and wall time. <b>The budgets differ" in text
    assert "<b>The clocks differ; these seconds can't be compared.</b> Losses are" in text
    assert "2 trials of 1 or 2 seconds of CPU time and wall time, judged by" in text
    write_report(records[:1], tmp_path, "Even")
    assert "<b>" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("phase", ["tuning", "tuned", "defaults", "fisher"])
def test_any_phase_alone_makes_a_page(tmp_path, study, phase):
    kept = [r for r in study if r["phase"] == phase][:1]
    write_report(kept, tmp_path, "Begun")
    assert list(numbers_of(tmp_path / "summary.json")["problems"]["curves"]) == [phase]
    assert drawn(tmp_path / "pictures")


def test_no_record_at_all_makes_a_page_that_says_so(tmp_path):
    assert "No run has finished yet" in write_report([], tmp_path, "Begun").read_text()
    assert numbers_of(tmp_path / "summary.json")["problems"] == {}


@pytest.mark.parametrize(
    "losses", [[], [1.0], [1.0, 1.0], [math.nan], [0.0, 0.0], [1e300, math.inf], [1e-9, 1e9]]
)
def test_runs_of_all_kinds_are_drawn(tmp_path, losses):
    records = [record("kfac", phase, losses) for phase in ("tuning", "tuned")]
    write_report(records, tmp_path, "Odd")
    numbers_of(tmp_path / "summary.json")
    assert len(list((tmp_path / "pictures").iterdir())) == 3


@pytest.mark.slow
def test_problems_whose_names_read_the_same_have_their_own_pictures(tmp_path):
    records = [record("kfac", "tuned", [1.0, 0.5], problem=name) for name in ("a b", "a/b")]
    write_report(records, tmp_path, "Two")
    assert len(drawn(tmp_path / "pictures")) == 4


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, study, monkeypatch):
    file = write_report(study[:3], tmp_path, "Old")
    old = file.read_bytes()

    def full(*_):
        raise OSError("no space")

    monkeypatch.setattr("smallfry.io.replace.os.replace", full)
    with pytest.raises(OSError, match="no space"):
        write_report([], tmp_path, "New")
    assert file.read_bytes() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pictures", "report.html", "summary.json"]


def test_sixteen_contestants_look_different(study):
    records = [record(f"o{i}", "tuned", []) for i in range(24)]
    records += [record(f"p{i}", "tuned", [], family="peer") for i in range(12)]
    found = looks(records)
    assert len(set(found.values())) == 36
    assert all(found[f"p{i}"].dashes for i in range(12))
    assert not found["o0"].dashes


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.001, 1.0, [0.001, 0.01, 0.1, 1.0]),
        (0.09, 0.8, [0.1, 0.15, 0.2, 0.3, 0.5, 0.7]),
        (0.0995, 0.1042, [0.1, 0.101, 0.102, 0.103, 0.104]),
        (1e-9, 1e9, [10.0**k for k in range(-9, 10, 3)]),
    ],
)
def test_ticks_are_few_and_round(low, high, wanted):
    assert log_ticks(low, high) == pytest.approx(wanted)


def test_of_many_layers_eight_are_drawn_with_the_first_and_the_last(tmp_path):
    names = [str(i) for i in range(12)]
    assert (len(set(some(names))), some(names)[0], some(names)[-1]) == (8, "0", "11")
    assert some(names[:8]) == names[:8]
    file = write_report([fisher_record("kfac", 12)], tmp_path, "Deep")
    assert "Of 12 layers, 8 are drawn" in file.read_text()


def test_names_in_pictures_are_short_and_no_formulas():
    assert written(["$a$", "_b", "c\nd"]) == [r"\$a\$", " _b", "c d"]
    assert len(written(["x" * 99])[0]) == 26


def test_figures_are_readable():
    assert [number(x) for x in (None, math.nan, 0.01234, 1234.5, 3, 1e-9)] == [
        *("–", "–", "0.0123", "1,234", "3", "1e-09")
    ]
    assert spread(Spread(0.5, 0.5, 0.5)) == "0.5000"
    assert "(0.4000 .. –)" in spread(Spread(0.5, 0.4, math.inf))
    assert settings({"lr": 0.1, "nesterov": True}) == "lr 0.1, nesterov True"


def test_cells_are_escaped():
    assert "<b>" not in table(["<b>"], [["<b>"]], groups=[("<b>", 1)])


def test_strict_values_are_json():
    value = {1: (math.nan, [math.inf, 0.5]), "a": Spread(0.1, -math.inf, 1.0), "b": {2}}
    assert strict(value) == {
        "1": [None, [None, 0.5]],
        "a": {"median": 0.1, "low": None, "high": 1.0},
        "b": "{2}",
    }
