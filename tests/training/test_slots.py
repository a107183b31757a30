"""Slots: each puzzle halts by itself, the next takes its place, and the carry resumes exactly."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from smallfry.errors import UsageError
from smallfry.models import TRM, ViTRM
from smallfry.models.contract import map_tensors
from smallfry.tasks import Batch
from smallfry.tasks.classification import Classification, ClassTargets
from smallfry.tasks.puzzle import Puzzle
from smallfry.training.build_objective import build_objective
from smallfry.training.config import ObjectiveConfig
from smallfry.training.objective import DeepSupervision, Stateful, Supervised
from smallfry.training.slots import SlotSupervision


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"img_size": 3, "num_classes": 5, "embed_dim": 8, "token_mlp": True, "prefix": 2}
    return TRM(**sizes, latent_steps=2, rounds=2, mlp_multiple=4).double()


def batch_of(seed, count=4):
    generator = torch.Generator().manual_seed(seed)
    grids = torch.randint(1, 5, (count, 1, 3, 3), generator=generator).double()
    return Batch(grids, torch.randint(1, 5, (count, 9), generator=generator))


def halting_at(model, *logits):
    """Let the halting head give these logits one step after the other."""
    given = iter(logits)
    read_out = model.read_out
    model.read_out = lambda state: read_out(state)._replace(halt_logits=next(given).double())


def run(slots, prepared, *batches):
    return [next(slots(prepared, batch)) for batch in batches]


def test_on_one_batch_slots_are_deep_supervision(model):
    batch, never = batch_of(0), torch.full((4,), -1.0)
    slots = SlotSupervision(Puzzle(), most_steps=3, exploration=0.0)
    prepared = slots.prepare(model)
    halting_at(model, *[never] * 9)
    found = run(slots, prepared, *[batch] * 3)
    wanted = list(DeepSupervision(Puzzle(), 3)(prepared, batch))
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours.outputs, theirs.outputs)
        halting = F.binary_cross_entropy_with_logits(never.double(), torch.zeros(4).double())
        assert_close(theirs.loss - ours.loss, 0.5 * halting)  # half the weight
        assert_close(ours.halting, theirs.halting)
        assert ours.last
    assert slots.carries[0].halted.all()  # after three steps
    assert slots.carries[0].steps.tolist() == [3] * 4


def test_a_slot_that_halts_takes_the_next_puzzle_and_starts_anew(model):
    slots = SlotSupervision(Puzzle(), most_steps=16, exploration=0.0)
    prepared = slots.prepare(model)
    halts = torch.tensor([1.0, -1.0, -1.0, 1.0])
    halting_at(model, halts, *[torch.full((4,), -1.0)] * 9)
    first, second = batch_of(0), batch_of(1)
    _, step = run(slots, prepared, first, second)
    carry = slots.carries[0]
    fresh = halts > 0
    for number, new in enumerate(fresh.tolist()):
        source = second if new else first
        assert torch.equal(carry.inputs[number], source.inputs[number])
        assert torch.equal(step.targets[number], source.targets[number])
    assert carry.steps.tolist() == [1, 2, 2, 1]
    alone = model.recurse(second.inputs, 1)[0].logits
    goes_on = model.recurse(first.inputs, 2)[1].logits
    assert_close(step.outputs, torch.where(fresh[:, None, None], alone, goes_on))
    assert not any(part.requires_grad for part in carry.state)


def test_exploration_delays_halting_and_the_last_step_ends_it():
    sure, steps = torch.full((4000,), 9.0), torch.full((4000,), 1)
    halts = SlotSupervision(Puzzle(), 16, exploration=0.3)._halts
    torch.manual_seed(0)
    assert halts(sure, steps).double().mean().item() == pytest.approx(0.7, abs=0.03)
    later = (
        halts(sure, torch.full((4000,), 9)).double().mean().item()
    )  # 2 … 9 of 2 … 16 have passed
    assert later == pytest.approx(1 - 0.3 * 7 / 15, abs=0.03)
    assert halts(sure, torch.full((4000,), 16)).all()
    assert halts(-sure, torch.full((4000,), 16)).all()
    assert not halts(-sure, torch.full((4000,), 15)).any()
    assert SlotSupervision(Puzzle(), 1, 1.0)._halts(-sure, steps).all()


@pytest.mark.parametrize("parts", [1, 2])
def test_the_carry_resumes_exactly(model, parts):
    def trained(parted):
        slots = SlotSupervision(Puzzle(), most_steps=4, exploration=0.5, parts=parts)
        prepared, found = slots.prepare(model), []
        for number in range(6):
            torch.manual_seed(number)
            if parted and number == 4:
                kept = slots.state_dict()
                slots = SlotSupervision(Puzzle(), 4, 0.5, parts)
                prepared = slots.prepare(model)
                slots.load_state_dict(kept, batch_of(0))
            for part in batch_of(number).split(parts):
                found.append(next(slots(prepared, part)).outputs)
        assert isinstance(slots, Stateful)
        assert len(slots.carries) == parts
        return torch.cat(found)

    torch.nn.init.normal_(model.halt_head.weight)
    assert torch.equal(trained(parted=True), trained(parted=False))
    other = SlotSupervision(Puzzle(), parts=parts + 1)
    other.prepare(model)
    slots = SlotSupervision(Puzzle(), parts=parts)
    prepared = slots.prepare(model)
    for part in batch_of(0).split(parts):
        next(slots(prepared, part))
    with pytest.raises(UsageError, match="another accumulate"):
        other.load_state_dict(slots.state_dict(), batch_of(0))


def test_a_learned_start_has_a_gradient_in_refilled_slots():
    torch.manual_seed(0)
    model = ViTRM(8, 4, 1, 3, embed_dim=16, num_heads=2, mlp_hidden_dim=8, drop_rate=0.0).double()
    labels = torch.tensor([0, 1])
    batch = Batch(
        torch.randn(2, 1, 8, 8).double(), ClassTargets(labels, F.one_hot(labels, 3).double())
    )
    slots = SlotSupervision(Classification(), most_steps=2, exploration=0.0)
    prepared = slots.prepare(model)
    model.halt_head.bias.data.fill_(9.0)
    run(slots, prepared, batch)
    next(slots(prepared, batch)).loss.backward()
    assert model.y_init.grad.abs().sum() > 0
    assert slots.likelihood["logits"] == "categorical"
    assert slots.likelihood["halt_logits"].factor == 0.5
    kept = map_tensors(torch.clone, slots.state_dict()["carries"][0]["targets"])
    assert torch.equal(kept[0], labels)


def test_it_is_built_by_name_and_is_the_tasks_own(model):
    built = build_objective(
        ObjectiveConfig(supervision_steps=7, exploration=0.2), model, "puzzle", 3
    )
    assert isinstance(built, SlotSupervision)
    assert (built.most_steps, built.exploration, built.parts) == (7, 0.2, 3)
    assert built.supervision_steps == 1
    named = build_objective(ObjectiveConfig("deep_supervision"), model, "puzzle")
    assert isinstance(named, DeepSupervision)
    plain = torch.nn.Linear(2, 2)
    assert isinstance(build_objective(ObjectiveConfig(), plain, "puzzle"), Supervised)
    with pytest.raises(UsageError, match="slots needs a recursive model, not Linear"):
        build_objective(ObjectiveConfig("slots"), plain)


def test_a_batch_of_another_size_is_refused(model):
    slots = SlotSupervision(Puzzle())
    prepared = slots.prepare(model)
    run(slots, prepared, batch_of(0))
    with pytest.raises(UsageError, match="4 slots can't take a batch of 3"):
        run(slots, prepared, batch_of(0, 3))
