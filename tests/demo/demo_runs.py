"""What the tests of the demo share: checkpoints of untrained models, in no time."""

import timm
import torch

import smallfry  # noqa: F401  registers the models
from smallfry.training.checkpoint import save_checkpoint

TINY = {"embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 16, "depth": 1, "latent_steps": 2}
DIGITS = tuple(map(str, range(10)))


def untrained(folder, name="vitrm_micro_patch4_8", classes=DIGITS, size=8, channels=1, **arguments):
    """The folder of a checkpoint of a model whose answers change from step to step."""
    torch.manual_seed(1)
    arguments |= {"num_classes": len(classes)}
    model = timm.create_model(name, **arguments)
    with torch.no_grad():  # fresh heads are all but zero
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    manifest = {
        "model": {"name": name, "arguments": arguments},
        "classes": list(classes),
        "input": {
            "size": size,
            "channels": channels,
            "mean": [0.5] * channels,
            "std": [0.25] * channels,
        },
        "data": {"name": "none", "fingerprint": ""},
    }
    save_checkpoint(folder, manifest, model.state_dict())
    return folder
