"""Spiking modules on generated routes: recall over route length, beside two plain baselines.

    nice -n 19 python benchmarks/kits_places.py --seeds 5 --out results/kits/places/recall.json

A route of 10 places a module and 50 calibration places is fitted once for each seed. Routes of
fewer modules are its first places, with the activity of neurons counted on these and the
calibration places alone. The threshold is chosen on the calibration places, among themselves.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from smallfry.kits.places.images import patch_normalise
from smallfry.kits.places.modules import ModularSNN, Settings
from smallfry.kits.places.pictures import draw_curves, draw_recalls
from smallfry.kits.places.scores import absolute_difference, precision_recall, recall_at, ridge
from smallfry.kits.places.traverse import TraverseSettings, draw_traverse

QUERIES = {"day": {}, "night and rain": {"night": True, "rain": True}}
SIZES = (3, 6, 12)
CALIBRATION = 50


def flat(images):
    return patch_normalise(images).reshape(*images.shape[:-2], -1)


def scored(scores, truth):
    curve = precision_recall(scores, truth)
    return {
        "recall_at_1": recall_at(scores, truth),
        "recall_at_5": recall_at(scores, truth, 5),
        "recall_within_1": recall_at(scores, truth, tolerance=1),
        "area": round(curve.area, 4),
        "recall_at_full_precision": curve.recall_at_full_precision,
    }


def one_seed(seed, presentations, theta_step, pictures):
    """Return the rows of a seed, and facts on its modules."""
    tested = 10 * max(SIZES)
    route = {"places": tested + CALIBRATION, "calibration": CALIBRATION, "seed": seed}
    references = np.stack([draw_traverse(TraverseSettings(**route), n) for n in range(2)])
    queries = {
        name: draw_traverse(TraverseSettings(**route, **changes), 2)
        for name, changes in QUERIES.items()
    }
    started = time.process_time()
    modules = ModularSNN(
        Settings(presentations=presentations, theta_step=theta_step, seed=seed)
    ).fit(references)
    seconds = time.process_time() - started
    recorded = modules.recorded
    spikes, active = recorded.sum(axis=2).mean(), (recorded > 0).sum(axis=2).mean()
    facts = {
        "seed": seed,
        "fit_cpu_seconds": round(seconds),
        "spikes_an_image_and_module": round(float(spikes), 2),
        "active_neurons": round(float(active), 2),
        "theta": [round(float(f(modules.theta)), 1) for f in (np.min, np.mean, np.max)],
    }
    known, rows = flat(references), []
    calibration = np.arange(tested, tested + CALIBRATION)
    for name, images in queries.items():
        responses = modules.respond(images)
        for size in SIZES:
            places = np.arange(10 * size)
            shown = np.concatenate([places, calibration])
            modules.activity = (recorded[shown] > 0).sum(axis=0)
            modules.threshold = 0
            plain = modules.scores(responses[places], places)
            choice = modules.choose_threshold(responses[calibration], calibration, calibration)
            silenced = modules.scores(responses[places], places)
            asked = flat(images[places])
            others = {
                "image_difference": absolute_difference(known[:, places], asked),
                "ridge": ridge(known[:, places], asked),
            }
            rows.append(
                {
                    "seed": seed,
                    "query": name,
                    "modules": size,
                    "threshold": choice.threshold,
                    "calibration_recall": choice.recalls[choice.threshold],
                    "unreachable": len({*modules.unreachable} & {*places.tolist()}),
                    "none_silenced": scored(plain, places),
                    "silenced": scored(silenced, places),
                    **{key: scored(value, places) for key, value in others.items()},
                }
            )
            print(json.dumps(rows[-1]), flush=True)
            if pictures is not None and seed == 0:
                pictures.mkdir(parents=True, exist_ok=True)
                drawn = {"spiking": plain, "hyperactive silenced": silenced, **others}
                file = pictures / f"{name.replace(' ', '_')}_{size}.png"
                draw_curves(drawn, places, file)
                recalls = file.with_name(f"{file.stem}_recalls.png")
                draw_recalls(choice.recalls, choice.threshold, recalls)
    return rows, facts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--presentations", type=int, default=560)
    parser.add_argument("--theta_step", type=float, default=0.0)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    rows, facts = [], []
    for seed in range(asked.seeds):
        found, about = one_seed(seed, asked.presentations, asked.theta_step, asked.pictures)
        rows, facts = rows + found, [*facts, about]
        print(json.dumps(about), flush=True)
        result = {
            "command": "python benchmarks/kits_places.py",
            "presentations": asked.presentations,
            "theta_step": asked.theta_step,
            "modules": facts,
            "runs": rows,
        }
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
