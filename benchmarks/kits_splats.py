"""Compress generated scenes of splats, with and without importance, and measure bytes and dB.

Each decoded scene is written as a PLY file and read by a second renderer, that of
benchmarks/splats_numpy.py, whose ratio stands beside the kit's. Six views are held out.
Written after each run; the same command goes on.

    python benchmarks/kits_splats.py --out results/kits/splats/scenes.json
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.splats_numpy import render_file
from smallfry.kits.splats.artifact import load
from smallfry.kits.splats.cameras import psnr, ring
from smallfry.kits.splats.codec import NeuralSplats, compress
from smallfry.kits.splats.generate import BODIES, generate
from smallfry.kits.splats.pictures import draw_views
from smallfry.kits.splats.prepare import prepare
from smallfry.kits.splats.render import render
from smallfry.kits.splats.scene import write_scene

FORMS: dict[str, dict[str, Any]] = {
    "weighted": {},
    "weighted, no fine-tuning": {"finetune": 0},
    "unweighted, no fine-tuning": {"finetune": 0, "is_weighted": False},
    "unweighted": {"is_weighted": False},
}


def measure(body: str, form: str, seed: int, count: int, picture: Path | None) -> dict[str, Any]:
    """Compress once; return bytes by part, dB of each view, and CPU seconds."""
    scene, cameras, held = generate(body, count, seed), ring(8), ring(6, start=0.5)
    settings = NeuralSplats(seed=seed, **FORMS[form])
    began = time.process_time()
    compressed = compress(scene, cameras, settings)
    seconds = time.process_time() - began
    with TemporaryDirectory() as folder:
        size = compressed.save(Path(folder) / "scene.splats")
        found = load(Path(folder) / "scene.splats")
        write_scene(scene, Path(folder) / "original.ply")
        write_scene(found.scene(), Path(folder) / "decoded.ply")
        plain = (Path(folder) / "original.ply").stat().st_size
        decoded = [render_file(Path(folder) / "decoded.ply", each) for each in held]
        original = [render_file(Path(folder) / "original.ply", each) for each in held]
    report = found.report(scene, held)
    assert report.total == size
    kept = prepare(scene, cameras, settings.prune).kept
    pruned = [psnr(render(scene.take(kept), each), render(scene, each)) for each in held]
    if picture is not None:
        draw_views(list(zip(decoded, original, strict=True)), picture)
    return {
        "bytes": dict(report.bytes),
        "file": size,
        "ply": plain,
        "ratio": round(plain / size, 2),
        "decibels": [round(each, 3) for each in report.decibels],
        "mean": round(float(np.mean(report.decibels)), 3),
        "mean of the second renderer": round(float(np.mean(list(map(psnr, decoded, original)))), 3),
        "pruned alone": round(float(np.mean(pruned)), 3),
        "cpu_seconds": round(seconds, 1),
    }


def main() -> None:
    """Run what is not recorded yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--gaussians", type=int, default=4000)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--bodies", nargs="+", choices=[*BODIES], default=[*BODIES])
    parser.add_argument("--forms", nargs="+", choices=[*FORMS], default=[*FORMS])
    given = parser.parse_args()
    record: dict[str, Any] = {
        "command": "python benchmarks/kits_splats.py",
        "data": f"generated scenes of {given.gaussians} Gaussians, 64×64 pixels",
        "compared": "images of the decoded scene with the original scene's, six held-out views",
        "runs": {},
    }
    if given.out.is_file():
        record = json.loads(given.out.read_text())
    for seed in given.seeds:
        for form in given.forms:
            for body in given.bodies:
                key = f"{body}, {form}, seed {seed}"
                if key in record["runs"]:
                    continue
                picture = given.picture if key == "torus, weighted, seed 0" else None
                found = measure(body, form, seed, given.gaussians, picture)
                record["runs"][key] = found
                given.out.parent.mkdir(parents=True, exist_ok=True)
                given.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
                print(key, found["ratio"], found["mean"], flush=True)


if __name__ == "__main__":
    main()
