"""TRM agrees with the reference outputs, and keeps what the paper says of its recursion."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.testing import assert_close

from smallfry import cost
from smallfry.models import TRM, LatentRecursive, Recursive, State
from smallfry.models.early_exit import recurse_until
from smallfry.models.trm import checkpoint_filter_fn
from smallfry.models.trm_layers import rms, truncated_normal
from smallfry.tasks import Batch
from smallfry.tasks.puzzle import Puzzle, log_stablemax
from smallfry.training.slots import SlotSupervision

GOLDEN = Path(__file__).parent / "golden"
FACTS = json.loads((GOLDEN / "trm.json").read_text())
TENSORS = load_file(GOLDEN / "trm.safetensors")
EXACT = {"atol": 1e-10, "rtol": 0}
SINGLE = {"atol": 1e-6, "rtol": 1e-5}
ROUNDED = {"atol": 2e-5, "rtol": 0}  # of twelve block calls in float32, with its rotary tables


def filled(name, shape):
    """Return the deterministic numbers s(name) that the reference outputs were made with."""
    count = int(np.prod(shape))
    h = np.arange(1, count + 1, dtype=np.uint64) * 0x9E3779B1
    h = (h + zlib.crc32(name.encode()) * 0x85EBCA6B) & 0xFFFFFFFF
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 1)):
        h ^= h >> np.uint64(shift)
        h = (h * factor) & 0xFFFFFFFF
    return torch.from_numpy(h / 2**31 - 1).view(shape)


def weight(name, shape):
    s = filled(name, shape)
    if len(shape) >= 2:
        return s * (3 / (s.numel() / shape[0])) ** 0.5
    return 0.2 * s


def small(kind, dtype=torch.float64):
    """Build the reference's small model, filled through the filter of the authors' names."""
    facts = FACTS["trm"]["small_mlp" if kind == "mlp" else "small_att"]
    config = facts["config"]
    model = TRM(
        img_size=4,
        num_classes=config["vocab_size"],
        embed_dim=config["hidden_size"],
        num_heads=config["num_heads"],
        depth=config["L_layers"],
        latent_steps=config["L_cycles"],
        rounds=config["H_cycles"],
        recursion_steps=config["halt_max_steps"],
        prefix=config["puzzle_emb_len"],
        puzzles=config["num_puzzle_identifiers"],
        token_mlp=kind == "mlp",
    ).double()
    named = {name: weight(name, shape) for name, shape in facts["tensors"] + facts["buffers"]}
    model.load_state_dict(checkpoint_filter_fn(named, model))
    return model.to(dtype).train(), facts


def grids():
    return TENSORS["inputs"].view(2, 1, 4, 4)


@pytest.mark.parametrize("kind", ["att", "mlp"])
def test_counts_and_names_are_the_authors(kind):
    model, facts = small(kind)
    counted = sum(p.numel() for p in model.parameters()) - model.embed_puzzle.numel()
    assert counted == facts["n_params"]
    assert {name for name, _ in model.named_buffers()} == {"y_init", "z_init"}
    own = model.state_dict()
    assert checkpoint_filter_fn(own, model) == own


@pytest.mark.parametrize(
    ("golden", "name", "changes"),
    [
        ("sudoku_mlp", "trm_sudoku9_mlp", {}),
        ("sudoku_att", "trm_sudoku9_attention", {}),
        ("maze_att", "trm_maze30", {}),
        ("arc_att", "trm_maze30", {"num_classes": 12}),
    ],
)
def test_the_papers_sizes_have_its_counts_and_products(golden, name, changes):
    facts = FACTS["trm"][golden]
    with torch.device("meta"):
        model = timm.create_model(name, **changes)
        rows = torch.zeros(1, 16 + model.input_shape[1] ** 2, 512)
    assert sum(p.numel() for p in model.parameters()) == facts["n_params"] + 512
    if "macs_one_block_call" in facts:
        assert cost(torch.nn.Sequential(*model.blocks), rows).macs == facts["macs_one_block_call"]


@pytest.mark.parametrize("kind", ["att", "mlp"])
@pytest.mark.parametrize("precision", ["f64", "f32"])
def test_every_block_call_and_head_is_the_references(kind, precision, monkeypatch):
    dtype, near = {"f64": (torch.float64, EXACT), "f32": (torch.float32, ROUNDED)}[precision]
    model, _ = small(kind, dtype)
    said = {k.removeprefix(f"{kind}.{precision}."): v for k, v in TENSORS.items()}
    x = model.embed(grids(), TENSORS["puzzle_identifiers"])
    assert_close(x, said["input_embeddings"], **SINGLE if precision == "f32" else EXACT)
    heads = SINGLE if precision == "f64" else ROUNDED  # kept in float32
    calls = []
    block = model._block
    monkeypatch.setattr(model, "_block", lambda rows: calls.append(block(rows)) or calls[-1])
    state, halted = model.initial_state(2), torch.tensor([True, True])
    for number in (1, 2):
        fresh = model.initial_state(2)
        state = State(
            *(torch.where(halted[:, None, None], a, b) for a, b in zip(fresh, state, strict=True))
        )
        step = model.step(x, state)
        names = [f"H{t}.{part}" for t in (1, 2) for part in ("L1", "L2", "H")]
        for name, call in zip(names, calls, strict=True):
            if precision == "f64":
                assert_close(call, said[f"step{number}.{name}"], **near)
            lengths = call.square().mean(-1)
            assert_close(lengths, torch.ones_like(lengths), atol=1e-3, rtol=0)
        calls.clear()
        assert_close(step.logits, said[f"step{number}.logits"], **near)
        assert_close(step.halt_logits.float(), said[f"step{number}.q_halt_logits"], **heads)
        both = model.halt_head(step.state.y[:, 0]).float()
        assert_close(both[:, 1], said[f"step{number}.q_continue_logits"], **heads)
        state, halted = State(*step.state).detach(), said[f"step{number}.halted"].bool()


@pytest.mark.parametrize("kind", ["att", "mlp"])
def test_slots_have_the_references_losses_gradients_and_halting(kind, monkeypatch):
    in_full = F.binary_cross_entropy_with_logits

    def in_half(logits, targets):  # as the reference computes the halting loss
        return in_full(logits.float(), targets.float())

    monkeypatch.setattr(F, "binary_cross_entropy_with_logits", in_half)
    model, _ = small(kind)
    said = {k.removeprefix(f"{kind}.f64."): v for k, v in TENSORS.items()}
    identities, embed = TENSORS["puzzle_identifiers"], model.embed
    model.embed = lambda inputs: embed(inputs, identities)
    slots = SlotSupervision(Puzzle(), most_steps=4, exploration=0.0)
    prepared = slots.prepare(model)
    batch = Batch(grids().double(), TENSORS["labels"])
    for number in (1, 2):
        model.zero_grad()
        step = next(slots(prepared, batch))
        step.loss.backward()
        wanted = {name: said[f"step{number}.{name}"] for name in ("loss", "lm_loss", "halted")}
        assert_close(2 * step.loss, wanted["loss"][0], atol=1e-7, rtol=0)  # a float32 part
        symbols = Puzzle().loss(step.outputs, batch.targets)
        assert_close(2 * symbols, wanted["lm_loss"][0], **EXACT)
        carry = slots.carries[0]
        assert carry.halted.tolist() == wanted["halted"].bool().tolist()
        assert carry.steps.tolist() == said[f"step{number}.steps"].tolist()
        norms = {k: v for k, v in said.items() if k.startswith(f"step{number}.grad_l2.")}
        found = dict(model.named_parameters())
        for name, norm in norms.items():
            theirs = name.removeprefix(f"step{number}.grad_l2.")
            (ours,) = checkpoint_filter_fn({theirs: norm}, model)
            assert_close(found[ours].grad.norm(), norm[0], atol=1e-9, rtol=0)
        down = "inner.L_level.layers.0.mlp.down_proj.weight"
        slice_ = said[f"step{number}.grad.{down}"]
        assert_close(found["blocks.0.mlp.fc2.weight"].grad[:, :16], slice_, **EXACT)
        rows = said[f"step{number}.grad.puzzle_embedding"]
        assert_close(model.embed_puzzle.grad[identities], rows, **EXACT)


@pytest.mark.parametrize("kind", ["att", "mlp"])
def test_a_step_is_differentiated_through_its_last_round_alone(kind):
    model, _ = small(kind)
    x, state = model.embed(grids()), model.initial_state(2)
    step = model.step(x, state)
    (found,) = torch.autograd.grad(step.logits.square().sum(), [model.blocks[0].mlp.fc1.weight])
    x, (y, z) = model.embed(grids()), state

    def round_of(y, z):
        for _ in range(model.latent_steps):
            z = model._block(z + y + x)
        return model._block(y + z), z

    y, z = (part.detach() for part in round_of(y, z))
    y, z = round_of(y, z)
    logits = model.head(y[:, 2:])
    (wanted,) = torch.autograd.grad(logits.square().sum(), [model.blocks[0].mlp.fc1.weight])
    assert_close(step.logits, logits)
    assert_close(found, wanted)
    assert_close(model.eval().step(x, state).logits, logits)  # in use, nothing is left out


def test_the_recursive_contract_is_kept_and_shared():
    model = timm.create_model("trm_sudoku4_micro").double().eval()
    assert isinstance(model, Recursive)
    assert not isinstance(model, LatentRecursive)  # it has several answer steps in each
    torch.manual_seed(0)
    inputs = torch.randint(1, 6, (5, 1, 4, 4)).double()
    trace = model.recurse(inputs)
    assert len(trace) == model.recursion_steps == 4
    assert_close(model(inputs), trace[-1].logits)
    state = None
    for step in trace:
        own = model.advance(inputs, state)
        assert_close(own.logits, step.logits)
        state = own.state
    assert trace[0].logits.shape == (5, 16, 6)
    torch.nn.init.normal_(model.halt_head.weight)
    with torch.no_grad():
        trace = model.recurse(inputs)
    first = trace[0].halt_logits.sigmoid()
    threshold = float(first.median())
    leaving = recurse_until(model, inputs, threshold)
    assert (leaving.steps == 1).tolist() == (first >= threshold).tolist()
    rows = torch.arange(5)
    assert_close(leaving.logits, torch.stack([s.logits for s in trace])[leaving.steps - 1, rows])
    assert timm.create_model("trm_sudoku4_micro", num_classes=0)(inputs.float()).shape[-1] == 64
    model.reset_classifier(9)
    assert model(inputs).shape == (5, 16, 9)


def test_attention_sees_positions_and_checkpointing_changes_nothing():
    torch.manual_seed(0)
    sizes = {"img_size": 3, "num_classes": 5, "embed_dim": 8, "num_heads": 2, "mlp_multiple": 8}
    inputs = torch.randint(1, 5, (2, 1, 3, 3)).double()
    moved = inputs.flatten(2)[..., torch.randperm(9)].view_as(inputs)
    sums = {}
    for positions in ("rotary", "learned", "none"):
        torch.manual_seed(1)
        model = TRM(**sizes, positions=positions, recursion_steps=1).double().eval()
        found = [model.forward_features(each)[:, 16:].sum(1) for each in (inputs, moved)]
        sums[positions] = (found[0] - found[1]).abs().max().item()
    assert sums["none"] < 1e-12 < 1e-3 < min(sums["rotary"], sums["learned"])
    model.train()
    losses = []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        model.advance(inputs).logits.square().sum().backward()
        losses.append(model.blocks[0].mlp.fc1.weight.grad.clone())
    assert_close(*losses)


def test_lengths_stay_at_one_and_initial_weights_have_the_papers_deviation():
    torch.manual_seed(0)
    assert_close(rms(torch.randn(3, 64) * 50).square().mean(-1), torch.ones(3), atol=1e-5, rtol=0)
    assert rms(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    drawn = torch.empty(200_000)
    truncated_normal(drawn, 0.5)
    assert drawn.std().item() == pytest.approx(0.5, rel=0.01)
    assert drawn.abs().max() <= 2 * 0.5 / 0.8796
    model = TRM(img_size=4, num_classes=6)
    assert model.halt_head.bias.tolist() == [-5.0, -5.0]
    assert model.blocks[0].mlp.fc1.weight.shape == (2 * 1536, 512)
    assert model.head.weight.std().item() == pytest.approx(512**-0.5, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"in_chans": 3}, "one channel"),
        ({"num_heads": 7}, "num_heads 7 does not divide"),
        ({"token_mlp": True, "positions": "rotary"}, "token_mlp has none"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"recursion_steps": 1000}, "too many"),
        ({"img_size": (4, 5)}, "square grids"),
        ({"drop_rate": 0.1}, "no dropout"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        TRM(**settings)


def test_grids_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"expected grids of shape \(batch, 1, 4, 4\)"):
        timm.create_model("trm_sudoku4_micro")(torch.ones(1, 1, 6, 6))


def test_the_loss_is_stable_max():
    facts = FACTS["log_stablemax"]
    logits = torch.tensor(facts["logits"], dtype=torch.float64)
    assert_close(
        log_stablemax(logits), torch.tensor(facts["values"], dtype=torch.float64), atol=1e-8, rtol=0
    )
    shares = torch.where(logits >= 0, logits + 1, 1 / (1 - logits))
    assert_close(log_stablemax(logits), (shares / shares.sum(-1, keepdim=True)).log())
    sure = torch.tensor([1e4, 0.0])
    assert F.softmax(sure, 0)[1] == 0 < log_stablemax(sure).exp()[1]
