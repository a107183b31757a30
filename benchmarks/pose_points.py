"""Poses from codes with wrong bits, by the own solver and by OpenCV.

python benchmarks/pose_points.py --out results/kits/pose/points.json
"""

import argparse
import json
from pathlib import Path

import numpy as np

from smallfry.kits.pose.mesh import generated_mesh, keypoints
from smallfry.kits.pose.metrics import add, diameter
from smallfry.kits.pose.scenes import SceneSettings, draw_scene
from smallfry_runtime.decoders.pose import estimate
from smallfry_runtime.pnp import project

BITS, LOST = 5, 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--poses", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jitter", type=float, default=0.0)
    options = parser.parse_args()
    settings = SceneSettings(test_jitter=options.jitter)
    mesh = generated_mesh(settings.shape)
    points = keypoints(mesh, 128)
    size = diameter(points)
    random = np.random.default_rng(0)
    rows = []
    for wrong in (0.0, 0.02, 0.05, 0.1):
        errors: dict[str, list[float]] = {"own": [], "opencv": [], "own, corners": []}
        for number in range(options.poses):
            scene = draw_scene(settings, mesh, "test", number, 16)
            first, cell = np.array(scene.crop[:2]), scene.crop[2] / 2**BITS
            cells = np.floor((project(points, scene.pose, scene.camera) - first) / cell).astype(int)
            inside = ((cells >= 0) & (cells < 2**BITS)).all(axis=1)
            flips = random.random((*cells.shape, BITS)) < wrong
            cells = cells.clip(0, 2**BITS - 1) ^ (flips << np.arange(BITS)).sum(axis=-1)
            for name, found in errors.items():
                share = 0.0 if "corners" in name else 0.5
                pixels = first + (cells + share) * cell
                solver = name.partition(",")[0]
                pose = estimate(points[inside], pixels[inside], scene.camera, cell, solver).pose
                found.append(LOST if pose is None else add(points, scene.pose, pose) / size)
        rows.append(
            {
                "wrong_bits": wrong,
                **{
                    name: {
                        "right": float((np.array(found) < 0.1).mean()),
                        "mean": float(np.minimum(found, LOST).mean()),
                        "worst": float(np.max(found)),
                    }
                    for name, found in errors.items()
                },
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    content = {"poses": options.poses, "jitter": options.jitter, "keypoints": 128, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
