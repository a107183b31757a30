"""Natural gradient in whole runs: both heads, stopping and resuming, wrong settings."""

from dataclasses import replace

import pytest
import timm
import torch
from run_helpers import StopAt

from smallfry.errors import Stopped, UsageError
from smallfry.models import ViTRM
from smallfry.tasks.classification import Classification, ClassTargets
from smallfry.training.checkpoint import load_checkpoint
from smallfry.training.config import DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from smallfry.training.objective import Batch, DeepSupervision
from smallfry.training.optimization import NATURAL, build_optimizer
from smallfry.training.progress import QuietReporter
from smallfry.training.train import resume, train

MODEL = ViTRM(8, 4, 1, 3, embed_dim=16, num_heads=2, mlp_hidden_dim=8)


@pytest.fixture
def variant(config):
    """A run of 2 steps an epoch."""
    small = replace(config, data=DataConfig(limit=70), threads=1)
    return lambda **changes: replace(small, **changes)


def natural(name="kfac", **options):
    return OptimizerConfig(name, lr=0.05, weight_decay=1e-3, clip=1.0, options=options)


@pytest.mark.parametrize(("name", "kind"), NATURAL.items())
def test_natural_gradient_optimizers_are_known_by_name(name, kind):
    optimizer = build_optimizer(natural(name, damping=0.5), MODEL)
    assert type(optimizer) is kind
    assert optimizer.damping == 0.5
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    assert trained == set(MODEL.parameters())
    undecayed = [g for g in optimizer.param_groups if not g["weight_decay"]]
    assert {
        n
        for n, p in MODEL.named_parameters()
        if any(p is q for g in undecayed for q in g["params"])
    } >= {"pos_embed", "y_init", "head.bias"}


def test_the_shared_block_and_both_heads_are_covered_by_the_joint_likelihood():
    objective = DeepSupervision(Classification(), 2)
    prepared = objective.prepare(MODEL)
    optimizer = build_optimizer(natural(), MODEL, prepared, objective.likelihood)
    layers = {layer for block in optimizer.blocks for layer in block.layers}
    assert {"patch_embed", "blocks.0.attn.qkv", "blocks.2.mlp.fc2", "head", "halt_head"} <= layers
    assert "z_init" in optimizer.uncovered
    MODEL.train()
    step = next(objective(prepared, _batch()))
    step.loss.backward()
    (seen,) = optimizer.observer.pending
    assert [len(z.shape) for z in seen.outputs] == [2, 1]
    qkv = next(b for b in optimizer.blocks if "blocks.0.attn.qkv" in b.layers)
    # x of 4 tokens and y of 1 once, z of 4 at the start and after each of three latent steps
    assert seen.rows(qkv, torch.float32).uses == 4 + 1 + 4 * 4
    fc1 = next(b for b in optimizer.blocks if "blocks.2.mlp.fc1" in b.layers)
    assert seen.rows(fc1, torch.float32).uses == 3 * 4 + 1  # the rows that are kept
    optimizer.step()
    assert optimizer.counters["statistics"] == 1
    assert float(optimizer.curvature["halt_head.weight"]["g"].abs().max()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NATURAL)
def test_every_method_trains_the_recursive_model(name):
    torch.manual_seed(0)
    model = ViTRM(8, 4, 1, 3, embed_dim=16, num_heads=2, mlp_hidden_dim=8)
    objective = DeepSupervision(Classification(), 2)
    prepared = objective.prepare(model)
    optimizer = build_optimizer(natural(name, damping=1.0), model, prepared, objective.likelihood)
    model.train()
    losses = []
    images = torch.rand(64, 1, 8, 8)
    labels = (images.flatten(1) @ torch.randn(64, 3)).argmax(1)
    batch = Batch(images, ClassTargets(labels, torch.nn.functional.one_hot(labels, 3).float()))
    for _ in range(12):
        for step in objective(prepared, batch):
            optimizer.zero_grad()
            step.loss.backward()
            optimizer.step()
            losses.append(float(step.loss.detach()))
    assert min(losses) < 0.7 * losses[0]
    assert max(losses) < 4 * losses[0]
    assert optimizer.counters["failed_refreshes"] == 0


def _batch():
    labels = torch.tensor([0, 1, 2, 0])
    targets = torch.nn.functional.one_hot(labels, 3).float()
    return Batch(torch.randn(4, 1, 8, 8), ClassTargets(labels, targets))


def test_a_run_that_was_stopped_resumes_bit_for_bit(variant, tmp_path):
    options = {"statistics_every": 3, "inverse_every": 4, "adaptive_damping": True}
    settings = {"optimizer": natural("kfac", **options), "epochs": 2}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(variant(run=whole, **settings))
    with pytest.raises(Stopped):
        train(variant(run=stopped, **settings), StopAt(2))
    resume(stopped, QuietReporter())
    one, other = (load_checkpoint(run / "last").trainer for run in (whole, stopped))
    for key, weight in one["weights"].items():
        assert torch.equal(weight, other["weights"][key]), key
    assert one["optimizer"]["counters"] == other["optimizer"]["counters"]


def test_micro_batches_and_a_plain_classifier_train_too(variant):
    model = ModelConfig(
        "vitrm_micro_patch4_8", options={"embed_dim": 16, "num_heads": 2, "mlp_hidden_dim": 8}
    )
    summary = train(
        variant(
            model=model,
            objective=ObjectiveConfig("cross_entropy"),
            optimizer=natural(),
            accumulate=2,
            epochs=1,
        )
    )
    assert summary["measured"]["epochs"] == 1


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_baselines_of_timm_are_covered(name):
    arguments = {"img_size": 32, "patch_size": 8} if "vit" in name else {}
    model = timm.create_model(name, num_classes=3, **arguments)
    optimizer = build_optimizer(natural(max_rows=64), model)
    covered = sum(b.size for b in optimizer.blocks)
    assert covered > 0.95 * sum(p.numel() for p in model.parameters())


def test_wrong_options_are_named():
    with pytest.raises(UsageError, match="KFAC has no setting 'dampness'; did you mean 'damping'"):
        build_optimizer(natural(dampness=1.0), MODEL)
    with pytest.raises(UsageError, match="has no betas"):
        build_optimizer(OptimizerConfig("kfac", betas=(0.9, 0.99)), MODEL)
    with pytest.raises(UsageError, match="did you mean 'kfac'"):
        build_optimizer(OptimizerConfig("kfa"), MODEL)
