"""Stereo with and without classes in the refinement, at equal steps, for several seeds.

python benchmarks/stereo_control.py --runs DIR --out results/kits/stereo/control.json
"""

import argparse
import json
from pathlib import Path

import numpy as np

import smallfry

KEPT = ("epe_1", "epe_2", "epe_3", "d1_3", "bad1_3", "miou_3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    rows = []
    for seed in options.seeds:
        for synergy in ("semantic", "blind"):
            run = options.runs / f"{synergy}-{seed}"
            if not (run / "summary.json").is_file():
                smallfry.train(
                    task="stereo",
                    model={
                        "name": "rts2net_c4",
                        "options": {"max_disparity": 48, "synergy": synergy},
                    },
                    seed=seed,
                    epochs=options.epochs,
                    run=str(run),
                    progress="quiet",
                )
            measured = json.loads((run / "summary.json").read_text())["measured"]
            scores = {name: measured["test"][name] for name in KEPT}
            seconds = measured["cpu_seconds"]
            rows.append({"seed": seed, "synergy": synergy, "cpu_seconds": seconds, **scores})
            print(json.dumps(rows[-1]), flush=True)
    gains = [
        blind["epe_3"] - plain["epe_3"] for plain, blind in zip(rows[::2], rows[1::2], strict=True)
    ]
    content = {
        "epochs": options.epochs,
        "rows": rows,
        "gain_px": {"mean": float(np.mean(gains)), "deviation": float(np.std(gains, ddof=1))}
        if len(gains) > 1
        else {"mean": gains[0]},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
