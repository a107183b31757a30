"""Drowsiness of generated subjects: each left out in turn, with four kinds of statistics.

nice -n 19 python benchmarks/kits_eeg.py --subjects 10 --out results/kits/eeg/subjects.json
"""

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from smallfry.errors import SmallfryWarning
from smallfry.kits.eeg.spindles import SpindleSettings, generate
from smallfry.kits.eeg.subjects import leave_one_out, mean_and_error, point_in_generated
from smallfry.training.run import load_run

BATCH = {"name": "interpretable_cnn", "options": {"norm": "batch"}}


def measured(results, options, settings):
    """Return accuracies, and the pointing game, of left-out subjects."""
    mean, error = mean_and_error(results)
    hits = [
        point_in_generated(load_run(each.run), SpindleSettings(**options, held_out=each.subject))
        for each in results
    ]
    return {
        **settings,
        "accuracy": round(mean, 4),
        "standard_error": round(error, 4),
        "subjects": [round(each.accuracy, 4) for each in results],
        "hits": round(sum(h.hits for h in hits) / sum(h.windows for h in hits), 4),
        "share_of_truth": round(float(np.mean([h.share for h in hits])), 4),
    }


@torch.inference_mode()
def by_batch(results, options):
    """Return accuracies by the windows that share a batch."""
    windows, _ = generate(SpindleSettings(**options))
    found = {"whole_subject": [], "single_windows": [], "drowsy_windows_alone": []}
    for each in results:
        trained = load_run(each.run)
        rows = np.flatnonzero(windows.subjects == each.subject)
        inputs = trained.normalize(windows.values[torch.from_numpy(rows)][:, None])
        states = torch.from_numpy(windows.states[rows])
        for name, part in (("whole_subject", states >= 0), ("drowsy_windows_alone", states == 1)):
            right = trained.model(inputs[part]).argmax(1) == states[part]
            found[name].append(right.double().mean().item())
        answers = torch.cat([trained.model(window[None]) for window in inputs]).argmax(1)
        found["single_windows"].append((answers == states).double().mean().item())
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}


def shuffled(folder, options, subject, seed):
    """Write windows whose states are shuffled but for one subject's, in the published layout."""
    windows, _ = generate(SpindleSettings(**options))
    states, others = windows.states.copy(), windows.subjects != subject
    states[others] = np.random.default_rng(seed).permutation(states[others])
    values = windows.values.numpy()
    np.savez(folder / "shuffled.npz", EEGsample=values, substate=states, subindex=windows.subjects)
    return {"name": "eeg-mat", "root": str(folder), "options": {"file": "shuffled.npz"}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=int, default=10)
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--level", default="easy")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--kinds", nargs="*", default=["population", "batch", "shuffled"])
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    warnings.simplefilter("ignore", SmallfryWarning)
    options = {"subjects": asked.subjects, "windows": asked.windows, "level": asked.level}
    data, subjects = {"name": "eeg-spindles", "options": options}, range(1, asked.subjects + 1)
    common = {"progress": "quiet", "threads": 1}
    rows = []
    for seed in range(asked.seeds):
        for kind in asked.kinds:
            started = time.process_time()
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                if kind == "population":
                    left = leave_one_out(subjects, folder, data, seed=seed, **common)
                elif kind == "batch":
                    other = {"model": BATCH, "methods": [], "seed": seed, **common}
                    left = leave_one_out(subjects, folder, data, **other)
                else:
                    left = []
                    for subject in subjects:
                        again = shuffled(folder, options, subject, seed)
                        left += leave_one_out([subject], folder, again, seed=seed, **common)
                row = measured(left, options, {"statistics": kind, "seed": seed})
                row |= {} if kind == "shuffled" else by_batch(left, options)
            row["cpu_seconds"] = round(time.process_time() - started)
            rows.append(row)
            print(json.dumps(row), flush=True)
    result = {"command": "python benchmarks/kits_eeg.py", "generated": options, "runs": rows}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
