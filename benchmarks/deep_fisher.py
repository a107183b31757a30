"""Accuracy of one and of two Fisher layers on CIFAR-10.

    python benchmarks/deep_fisher.py --root DIR --limit 2000 --tested 1000 --out FILE
    python benchmarks/deep_fisher.py --root DIR --components 32 64 --features 64 --seeds 3
    python benchmarks/deep_fisher.py --root DIR --limit 2000 --layers 1 --fuse MODEL

The same images, descriptors and first mixture for both; two layers add the second layer's vector.
``--fuse`` adds the scores to those of a trained network, with weights from other test images.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import torch

from smallfry.data import Split, load_data
from smallfry.deploy.pretrained import load_trained
from smallfry.estimators.deep_fisher import DeepFisherNet
from smallfry.estimators.late_fusion import fuse, fusion_weights
from smallfry.training.evaluation import predict
from smallfry.training.provenance import provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default=None, help="folder with CIFAR-10")
    parser.add_argument("--limit", type=int, default=None, help="training images")
    parser.add_argument("--tested", type=int, default=10_000, help="test images")
    parser.add_argument("--components", type=int, nargs=2, default=(16, 32))
    parser.add_argument("--features", type=int, default=32, help="of a patch, and of stacked ones")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--fuse", type=Path, default=None, help="run or shared model of CIFAR-10")
    parser.add_argument("--held", type=int, default=1000, help="test images for the weights")
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")  # the support vector machine's, of its number of iterations
    data = load_data("cifar10", given.root, limit=given.limit)
    test = data.test.take(torch.arange(min(given.tested, len(data.test))))
    images, labels = data.train.images.numpy(), data.train.labels.numpy()
    fused = None if given.fuse is None else given.fuse.name
    record = {**vars(given), "out": None, "root": None, "fuse": fused}
    record |= {"trained_on": len(labels), "runs": []}
    for seed in range(given.seeds):
        for layers in given.layers:
            begun = time.process_time()
            model = DeepFisherNet(
                layers=layers,
                components=tuple(given.components),
                patch_features=given.features,
                stacked=given.features + given.features // 2,
                batch_size=25,
                random_state=seed,
            ).fit(images, labels)
            run = {
                "layers": layers,
                "seed": seed,
                "accuracy": float(model.score(test.images.numpy(), test.labels.numpy())),
                "features": model.transform(test.images.numpy()[:1]).shape[1],
                "cpu_seconds": round(time.process_time() - begun, 1),
            }
            if given.fuse is not None:
                run |= fusion(model, given.fuse, data.test, len(test), given.held)
            record["runs"].append(run)
            print(json.dumps(run), flush=True)
    if given.out is not None:
        record["provenance"] = provenance(torch.device("cpu"))
        given.out.write_text(json.dumps(record, indent=2) + "\n")


def fusion(net: DeepFisherNet, folder: Path, images: Split, tested: int, held: int) -> dict:
    """Return the accuracies of a trained network and of both, by the weights of other images."""
    network, module = load_trained(folder), net.to_module()
    chosen = images.take(torch.arange(tested + held))
    with torch.inference_mode():
        fisher = [module(part.float()) for part in chosen.images.split(25)]
    scores = [torch.cat(fisher), predict(network.model, chosen, network.normalize).logits]
    weights = fusion_weights([each[tested:] for each in scores], chosen.labels[tested:])
    both, labels = fuse([each[:tested] for each in scores], weights), chosen.labels[:tested]
    return {
        "network_accuracy": float((scores[1][:tested].argmax(1) == labels).double().mean()),
        "fused_accuracy": float((both.argmax(1) == labels).double().mean()),
        "weights": weights.tolist(),
    }


if __name__ == "__main__":
    main()
