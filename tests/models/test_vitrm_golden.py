"""Parity with the authors' implementation: every number of the golden files is looked at."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from smallfry.models.vitrm import ViTRM, checkpoint_filter_fn
from smallfry.tasks.classification import Classification, ClassTargets
from smallfry.training.config import EMAConfig, OptimizerConfig
from smallfry.training.objective import Batch, DeepSupervision
from smallfry.training.optimization import WeightAverage, build_optimizer

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = {"f32": {"atol": 1e-5, "rtol": 1e-5}, "f64": {"atol": 1e-9, "rtol": 1e-9}}
DTYPE = {"f32": torch.float32, "f64": torch.float64}


def steps(objective, model, batch):
    return objective(objective.prepare(model), batch)


@pytest.fixture(scope="module", params=["init", "perturbed", "optim"])
def golden(request):
    return load_file(GOLDEN / f"vitrm_small_{request.param}.safetensors")


def golden_model(golden: dict[str, Tensor], dtype: torch.dtype) -> ViTRM:
    model = ViTRM(
        patch_size=8, embed_dim=32, num_heads=2, mlp_hidden_dim=48, latent_steps=2, drop_rate=0.0
    )
    theirs = {k.removeprefix("param."): v for k, v in golden.items() if k.startswith("param.")}
    model.load_state_dict(checkpoint_filter_fn(theirs, model))
    return model.to(dtype)


def golden_batch(golden: dict[str, Tensor], dtype: torch.dtype, mixed: bool) -> Batch:
    eye = torch.eye(10, dtype=dtype)
    targets = eye[golden["labels"]]
    if mixed:
        lam = golden["lam"].to(dtype)
        targets = lam * targets + (1 - lam) * eye[golden["labels_b"]]
    return Batch(golden["images"].to(dtype), ClassTargets(golden["labels"], targets))


def named(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, by our parameter names."""
    found = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
    return checkpoint_filter_fn(found, None)


@pytest.mark.parametrize("precision", ["f32", "f64"])
def test_states_and_outputs_of_every_step_equal_the_authors(golden, precision):
    if f"{precision}.x_tokens" not in golden:
        pytest.skip("this file holds optimizer steps only")
    model = golden_model(golden, DTYPE[precision]).eval()
    images = golden["images"].to(DTYPE[precision])
    x = model.embed(images)
    found = {"x_tokens": x}
    state = model.initial_state(len(images))
    for number in (1, 2):
        thinking = state
        for latent in (1, 2):
            thinking = model.think(x, thinking)
            found[f"step{number}.z_latent{latent}"] = thinking.z
        step = model.step(x, state)
        found |= {
            f"step{number}.y": step.state.y,
            f"step{number}.z": step.state.z,
            f"step{number}.logits": step.logits,
            f"step{number}.halt_logit": step.halt_logits,
        }
        state = step.state.detach()
    wanted = {k: v for k, v in golden.items() if k.startswith((f"{precision}.x", f"{precision}.s"))}
    assert len(wanted) >= 11
    for key, value in wanted.items():
        actual = found[key.removeprefix(f"{precision}.")]
        assert_close(actual, value, **TOLERANCE[precision], msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("kind", ["plain", "mixed"])
@pytest.mark.parametrize("precision", ["f32", "f64"])
def test_losses_and_gradients_of_supervised_steps_equal_the_authors(golden, precision, kind):
    if f"{precision}.{kind}.step1.ce" not in golden:
        pytest.skip("this file holds optimizer steps only")
    model = golden_model(golden, DTYPE[precision])
    batch = golden_batch(golden, DTYPE[precision], kind == "mixed")
    for number, step in enumerate(
        steps(DeepSupervision(Classification(), supervision_steps=2), model, batch), start=1
    ):
        prefix = f"{precision}.{kind}.step{number}"
        model.zero_grad()
        step.loss.backward()
        if f"{prefix}.loss" in golden:
            assert_close(step.loss.detach(), golden[f"{prefix}.loss"], **TOLERANCE[precision])
        for name, gradient in named(golden, f"{prefix}.grad.").items():
            given_in = "f32" if gradient.dtype == torch.float32 else "f64"
            actual = model.get_parameter(name).grad.to(gradient.dtype)
            assert_close(actual, gradient, **TOLERANCE[given_in], msg=lambda m, n=name: f"{n}: {m}")


def test_the_golden_files_give_gradients_of_every_parameter():
    perturbed = load_file(GOLDEN / "vitrm_small_perturbed.safetensors")
    for kind in ("plain", "mixed"):
        given = named(perturbed, f"f64.{kind}.step1.grad.")
        assert set(given) == {
            name for name, _ in golden_model(perturbed, torch.float64).named_parameters()
        }


def test_timm_reads_weights_under_the_authors_names(golden, tmp_path):
    theirs = {k.removeprefix("param."): v for k, v in golden.items() if k.startswith("param.")}
    save_file(theirs, tmp_path / "theirs.safetensors")
    model = timm.create_model(
        "vitrm_small_patch4_32",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "theirs.safetensors")},
        patch_size=8,
        embed_dim=32,
        num_heads=2,
        mlp_hidden_dim=48,
    )
    assert_close(model.state_dict(), dict(golden_model(golden, torch.float32).state_dict()))


def test_two_adamw_and_ema_steps_equal_the_authors():
    golden = load_file(GOLDEN / "vitrm_small_optim.safetensors")
    model = golden_model(golden, torch.float64)
    optimizer = build_optimizer(
        OptimizerConfig("adamw", lr=3e-4, weight_decay=0.05, decay="all", betas=(0.9, 0.999)), model
    )
    average = WeightAverage(model, EMAConfig(decay=0.999, warmup=False))
    batch = golden_batch(golden, torch.float64, mixed=False)
    for number in (1, 2):  # the same batch twice, each time from the initial state
        optimizer.zero_grad()
        next(steps(DeepSupervision(Classification()), model, batch)).loss.backward()
        optimizer.step()
        average.update(model, number - 1)
        for kind, actual in (("param", model), ("ema", average.module)):
            wanted = named(golden, f"f64.adamw{number}.{kind}.")
            assert len(wanted) == 45
            for name, value in wanted.items():
                # stored in float32: one step moves a weight by 3e-4, so this sees a 1e-3rd of it
                found = actual.get_parameter(name).data.float()
                assert_close(found, value.float(), atol=3e-7, rtol=3e-7)
