"""A fit that is killed while it prunes or learns four bits ends as one that is not."""

import csv
import json
import signal
import subprocess
import sys
import time

import pytest

from smallfry.deploy import Runtime
from smallfry.fitting import run as fit_module
from smallfry.fitting.config import FitConfig
from smallfry.fitting.costs import Costs
from smallfry.fitting.plan import Plan, Planned
from smallfry.fitting.run import fit, load_images
from smallfry.fitting.zoo import Entry, scaled
from smallfry.training.config import DataConfig

pytestmark = pytest.mark.slow
NAME = "loopnet_70k-0.35"
CONFIG = FitConfig(DataConfig("digits", limit=200), max_kb=12, minutes=1, threads=1, device="cpu")
ARGUMENTS = ["--data", "digits", "--data.limit", "200", "--max_kb", "12", "--minutes", "1"]
ARGUMENTS += ["--threads", "1", "--device", "cpu"]
COMPRESSED = (f"{NAME}-pruned-int8", f"{NAME}-lsq4")
LATE = 300  # seconds, after which a fit is taken to hang


def begin(folder):
    """Begin a fit of one candidate whose int8 is too large, so that all is pruned or rounded."""
    entry = Entry("loopnet_70k", "loopnet_70k", 0.35, "loopnet", scaled("loopnet_70k", 0.35))
    costs = Costs(8000, 50_000, {"float32": 44.1, "int8": 14.7}, {"float32": 0.1, "int8": 0.1})
    candidates = (Planned(entry, costs, 1.0, "32-true"),)
    fingerprint = load_images(CONFIG).fingerprint
    folder.mkdir(parents=True)
    fit_module.write_result(CONFIG, folder, None)
    Plan(candidates, (1,), 2.0, 20.0, 1, fingerprint, {}).write(folder / "plan.json")
    return folder


def epochs_of(run):
    try:
        with open(run / "metrics.csv", newline="") as file:
            return sum(1 for _ in csv.reader(file)) - 1
    except FileNotFoundError:
        return -1


def killed_once(folder, moment):
    """Run the command until a moment, and kill it."""
    command = [sys.executable, "-m", "smallfry", "fit", *ARGUMENTS, "--to", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ends = time.monotonic() + LATE
    while not moment() and process.poll() is None and time.monotonic() < ends:
        time.sleep(0.01)
    assert moment()
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert json.loads((folder / "fit.json").read_text())["result"] is None


def without_times(record):
    return {name: value for name, value in record.items() if name != "ms"}


def outcome(folder, found):
    """All that a fit decides and stores, but measured times."""
    exports = [json.loads(line) for line in (folder / "exports.jsonl").read_text().splitlines()]
    chosen = without_times(found.summary["chosen"])
    trials = (folder / "trials.jsonl").read_text()
    return {**found.summary, "chosen": chosen}, [*map(without_times, exports)], trials


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = begin(tmp_path_factory.mktemp("whole") / "fit")
    return fit(CONFIG, folder, quiet=True), folder


def test_the_candidate_is_pruned_and_rounded_to_the_budget(undisturbed):
    found, folder = undisturbed
    records = outcome(folder, found)[1]
    assert {*COMPRESSED} <= {each["name"] for each in records}
    assert all(each["failure"] is None for each in records)
    assert found.met
    assert found.summary["chosen"]["kb"] <= 12
    for run in COMPRESSED:
        assert epochs_of(folder / "runs" / run) >= 3


def test_killed_at_the_start_and_within_pruning_and_rounding_it_makes_the_same_choice(
    undisturbed, tmp_path
):
    folder = begin(tmp_path / "killed")
    for run in COMPRESSED:
        place = folder / "runs" / run
        killed_once(folder, (place / "config.yaml").exists)
        killed_once(folder, lambda place=place: epochs_of(place) >= 2)
        assert epochs_of(place) < epochs_of(undisturbed[1] / "runs" / run)
    found = fit(CONFIG, folder, quiet=True)
    assert outcome(folder, found) == outcome(undisturbed[1], undisturbed[0])
    for name in ("export", *(f"exports/{run}" for run in COMPRESSED)):
        ours, theirs = (Runtime(at / name).manifest for at in (folder, undisturbed[1]))
        assert ours.source == theirs.source  # the same weights to the bit
        assert ours.files == theirs.files
