"""Metric scale, teacher and flights of the kit uav, in generated rooms of testing.

    python benchmarks/uav.py scale --out FILE
    python benchmarks/uav.py teacher --student runs/masks --out FILE
    python benchmarks/uav.py flights --pilot truth|runs/masks|runs/policy --count 100 --out FILE
    python benchmarks/uav.py film --student runs/masks --room 0 --out docs/pictures/uav_flight.gif

Nothing here is real: rooms, noise and depth are generated, by the version that each file states.
"""

import argparse
import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import smallfry
from smallfry.kits.uav.flight import Flight, Glance, Pilot, Policy, fly, relative_depth
from smallfry.kits.uav.pictures import draw_depth, draw_flights, draw_masks, film
from smallfry.kits.uav.rooms import FLOOR, OBSTACLE, VERSION, Room, make_room, random_of
from smallfry.kits.uav.segmentation import confusion, intersection_over_union
from smallfry.kits.uav.students import masks_of, policy_of
from smallfry.kits.uav.teacher import EXAMPLES, ColourTeacher, pseudo_label
from smallfry.kits.uav.views import ViewSettings, draw_view
from smallfry_runtime.decoders.uav_segmentation import metric_scale

VIEWS, NEAR, FLIPPED, PITCH_ERROR = 200, 4.0, 0.03, 2.0
AFFINE = (0.6, 0.15)  # 1 / Z = a r + b of the generated inverse depth


def scale(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the error of metric depth on boxes nearer than 4 m, in centimetres."""
    found: dict[str, Any] = {}
    for model in ("scale", "inverse_affine"):
        for noisy in (False, True):
            for tilt in (0.0, PITCH_ERROR):
                name = f"{model}, {'noisy' if noisy else 'exact'} depth, pitch off by {tilt:g}°"
                found[name] = _scale_errors(options.seed, model, noisy, tilt)
    return {"views": VIEWS, "labels_flipped": FLIPPED, "errors_cm": found}


def _scale_errors(seed: int, model: Any, noisy: bool, tilt: float) -> dict[str, Any]:
    errors, without = [], 0
    for number in range(VIEWS):
        view, camera, _ = draw_view(ViewSettings(seed=seed), "test", number)
        random = random_of("uav-scale", "test", seed, number)
        labels = view.labels.copy()
        flipped = random.random(labels.shape) < FLIPPED
        labels[flipped] = random.integers(0, 3, int(flipped.sum()))
        noise = (0.05, 0.1) if noisy else (0.0, 0.0)
        depth = relative_depth(view.depth, random, 1.0, *noise)
        relative = depth / 1.7 if model == "scale" else (1 / depth - AFFINE[1]) / AFFINE[0]
        known = replace(camera, pitch=camera.pitch + tilt)
        fit = metric_scale(relative, labels == FLOOR, known, model)
        near = (view.labels == OBSTACLE) & (view.depth < NEAR)
        if fit is None:
            without += 1
        elif near.any():
            errors.append(float(np.abs(fit.depth(relative) - view.depth)[near].mean()) * 100)
    values = np.array(errors)
    quantiles = dict(zip(("median", "p90", "max"), np.quantile(values, (0.5, 0.9, 1)), strict=True))
    rounded = {name: round(float(value), 2) for name, value in quantiles.items()}
    return {
        "mean": round(float(values.mean()), 2),
        **rounded,
        "measured": len(values),
        "without_floor": without,
    }


def teacher(options: argparse.Namespace) -> dict[str, Any]:
    """Compare a student with the colour teacher and with the truth, by mean IoU."""
    settings = ViewSettings(seed=options.seed)
    shown = [draw_view(settings, "teacher", n)[0] for n in range(EXAMPLES)]
    images, labels = (np.stack([getattr(v, k) for v in shown]) for k in ("pixels", "labels"))
    colours = ColourTeacher.fit(images, labels, options.seed, fast=True)  # as of uav-rooms
    views = [draw_view(settings, "test", number)[0] for number in range(VIEWS)]
    truth = np.stack([view.labels for view in views])
    pictures = np.stack([view.pixels for view in views])
    taught = pseudo_label(colours, pictures)
    segment = masks_of(smallfry.load(options.student))
    student = np.stack([segment(picture) for picture in pictures])
    if options.picture is not None:
        masks = {"truth": truth[:8], "teacher": taught[:8], "student": student[:8]}
        draw_masks(torch.from_numpy(pictures[:8]), masks, options.picture)
    return {
        "views": VIEWS,
        "teacher_against_truth": _iou(taught, truth),
        "student_against_truth": _iou(student, truth),
        "student_against_teacher": _iou(student, taught),
    }


def _iou(found: Any, labels: Any) -> dict[str, float]:
    table = confusion(torch.from_numpy(found), torch.from_numpy(labels), 3)
    each = intersection_over_union(table)
    names = ("other", "floor", "obstacle", "mean")
    values = [*each.tolist(), each.mean().item()]
    return {name: round(value, 4) for name, value in zip(names, values, strict=True)}


def flights(options: argparse.Namespace) -> dict[str, Any]:
    """Fly in rooms of testing, and count how the flights ended."""
    begun, done = time.process_time(), []
    for number in range(options.count):
        done.append(fly(_policy(options.pilot), make_room(number, "test", options.seed)))
    spent = time.process_time() - begun
    if options.picture is not None:
        unsafe = [n for n, each in enumerate(done) if not each.is_safe]
        chosen = [*unsafe[:4], *(n for n in range(len(done)) if n not in unsafe)][:8]
        rooms = [make_room(n, "test", options.seed) for n in chosen]
        draw_flights(rooms, [done[n] for n in chosen], options.picture)
    return {
        "pilot": "true masks" if options.pilot == "truth" else _task_of(options.pilot),
        "flights": options.count,
        "without_contact": sum(each.is_safe for each in done),
        "outcomes": dict(Counter(each.outcome for each in done)),
        "mean_distance_m": round(float(np.mean([each.distance for each in done])), 2),
        "mean_covered_m2": round(float(np.mean([each.covered for each in done])), 2),
        "mean_seconds": round(float(np.mean([each.seconds for each in done])), 1),
        "cpu_seconds": round(spent, 1),
    }


def _task_of(run: str) -> str:
    return f"student of {smallfry.load(run).manifest['task']}"


def _policy(pilot: str) -> Policy:
    if pilot == "truth":
        return Pilot()
    trained = smallfry.load(pilot)
    return policy_of(trained) if "policy" in trained.manifest["task"] else Pilot(masks_of(trained))


def make_film(options: argparse.Namespace) -> dict[str, Any]:
    """Film a flight of the state machine with a student's masks."""
    segment, glances = masks_of(smallfry.load(options.student)), list[Glance]()
    room: Room = make_room(options.room, "test", options.seed)
    pilot = Pilot(segment)
    done: Flight = fly(pilot, room, watch=lambda glance, _: glances.append(glance))
    masks = [segment(glance.view.pixels) for glance in glances]
    film(room, glances, masks, done, options.out)
    if options.picture is not None:
        number = int(np.argmax([(mask == OBSTACLE).sum() for mask in masks]))
        scaled = metric_scale(
            glances[number].relative, masks[number] == FLOOR, glances[number].camera
        )
        if scaled is not None:
            depth = scaled.depth(glances[number].relative)
            shown = {"truth": glances[number].view.labels, "student": masks[number]}
            draw_depth(glances[number], shown, depth, options.picture)
    return {"outcome": done.outcome, "seconds": done.seconds}


def main() -> None:
    """Run one experiment."""
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = {"scale": scale, "teacher": teacher, "flights": flights, "film": make_film}
    parser.add_argument("what", choices=kinds)
    parser.add_argument("--student", help="run of uav-segmentation")
    parser.add_argument("--pilot", default="truth", help="truth, or a run of a student")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--room", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {"rooms_version": VERSION, "seed": options.seed, **kinds[options.what](options)}
    text = json.dumps(found, indent=1, ensure_ascii=False)
    print(text)
    if options.what != "film":
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
