"""N2N as a strategy: order, limits, transfer, and the enumerated table."""

import numpy as np
import pytest
import torch

from smallfry.errors import UsageError
from smallfry.search import RandomSearch, Trial, replay
from smallfry.search.n2n import N2N, Layer
from smallfry.search.n2n.strategy import load_policies
from smallfry.search.tables import TableEvaluator, load_table
from smallfry.search.tables.micro_n2n import LAYERS

SHARES = (0.0, 0.5, 1.0)
FOUR = [Layer(name, SHARES, outputs=(n + 1) / 4) for n, name in enumerate("abcd")]


def value_of(candidate):
    """Best without b and d, and with half of a and c."""
    wanted = {"a": 0.5, "b": 0.0, "c": 0.5, "d": 0.0}
    return 1 - sum(abs(candidate[name] - share) for name, share in wanted.items()) / 4


def searched(search, together=1):
    trials = []
    while asked := search.ask(together):
        told = [Trial(each, value_of(each)) for each in asked]
        search.tell(told)
        trials += told
    return trials


def new(count=40, **settings):
    return N2N(FOUR, count, lambda trial: trial.value, **settings)


@pytest.mark.parametrize("advantage", ["rollout", "batch"])
def test_both_stages_find_the_best_student_of_a_small_teacher(advantage):
    search = new(60, seed=1, advantage=advantage)
    trials = searched(search)
    best = max(trials, key=lambda trial: trial.value)
    assert best.value == 1
    assert search.state_dict()["stage"] == "shrinkage"
    assert len(trials) == len({tuple(trial.candidate.values()) for trial in trials})
    first = next(n for n, t in enumerate(trials) if 0.5 in t.candidate.values())
    base = max(trials[:first], key=lambda trial: trial.value).candidate
    removed = [[share == 0 for share in trial.candidate.values()] for trial in trials]
    assert removed[first] == [share == 0 for share in base.values()]
    assert all(each in removed[:first] for each in removed[first:])


def test_the_students_do_not_depend_on_how_many_are_asked_for_at_once():
    assert searched(new(), 1) == searched(new(), 3) == searched(new(), 99)


def test_a_search_resumes_from_its_trials():
    whole = searched(new())
    again = new()
    replay(again, whole[:13])
    assert whole[:13] + searched(again) == whole
    assert searched(new(seed=1)) != whole


def test_a_failed_training_is_worth_as_little_as_an_impossible_student():
    search = new(30)
    while asked := search.ask(1):
        failed = asked[0]["a"] == 1.0
        search.tell([Trial(asked[0], None if failed else value_of(asked[0]), failure="no")])
    chosen = search.state_dict()["told"]
    assert len([each for each in chosen if each["value"] is None]) < len(chosen)


def test_students_that_cannot_be_built_are_not_asked_for():
    search = new(30, allowed=lambda student: student["a"] > 0)
    trials = searched(search)
    assert trials
    assert all(trial.candidate["a"] > 0 for trial in trials)
    assert all(any(trial.candidate.values()) for trial in searched(new(80)))


@pytest.mark.slow
def test_students_beyond_a_limit_are_trained_while_the_penalty_is_mild():
    search = N2N(
        [Layer(name, SHARES) for name in "abcdefgh"],
        400,
        lambda trial: trial.value,
        within=lambda student: sum(student.values()) <= 5,
    )
    beyond = []
    while asked := search.ask(1):
        state = search.state_dict()
        small = sum(asked[0].values()) <= 5
        beyond += [] if small else [state["iteration"]]
        search.tell([Trial(asked[0], 0.5 if small else 0.9)])
    assert beyond  # at first nearly all layers are kept
    assert max(beyond) < 15


def test_policies_transfer_to_another_teacher(tmp_path):
    learned = N2N(
        [Layer(name, SHARES) for name in "abcdef"],
        60,
        lambda trial: trial.value,
        removal=0.9,
        seed=2,
    )
    for _ in range(400):  # the fewer layers, the better
        if not (asked := learned.ask(5)):
            break
        learned.tell([Trial(each, 1 - sum(each.values()) / 6) for each in asked])
    file = tmp_path / "policies.safetensors"
    learned.save_policies(file)
    larger = [Layer(f"l{number}", SHARES) for number in range(10)]
    fresh = N2N(larger, 5, lambda trial: 0.0)
    warm = N2N(larger, 5, lambda trial: 0.0, policies=load_policies(file))

    def kept(search):
        numbers = torch.tensor([layer.descriptor(n / 9) for n, layer in enumerate(larger)])
        logits = search.policies["removal"].logits(numbers, torch.zeros(1, 10, dtype=torch.int64))
        return logits.softmax(-1)[..., 1].mean().item()

    assert kept(fresh) > 0.8
    assert kept(warm) < kept(fresh) - 0.05
    for name, weights in load_policies(file).items():
        for key, value in learned.policies[name].state_dict().items():
            assert torch.equal(value, weights[key])


def test_policies_of_other_shares_are_refused(tmp_path):
    file = tmp_path / "policies.safetensors"
    N2N([Layer("a", (0.25, 0.5, 1.0))], 5, lambda trial: 0.0).save_policies(file)
    with pytest.raises(UsageError, match="shrinkage has other sizes"):
        new(policies=load_policies(file))
    with pytest.raises(UsageError, match="has the policies removal, shrinkage, not 'growth'"):
        new(policies={"growth": {}})


@pytest.mark.parametrize(
    "settings", [{"rollouts": 0}, {"removal": 2.0}, {"advantage": "none"}, {"count": 0}]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UsageError, match="n2n needs"):
        new(**settings)


def test_on_the_table_n2n_needs_fewer_students_than_random_search():
    table = load_table("micro_n2n")
    rewards = table.rewards(table.accuracy / 100, table.parameters)
    assert rewards.shape == (1023,)
    assert table.position(dict.fromkeys([layer.name for layer in LAYERS], 1.0)) == 1022
    assert abs(rewards[1022]) < 1e-12  # the teacher's own size is no compression
    top = {*np.argsort(-rewards, kind="stable")[:10].tolist()}

    def reached(seed, strategy):
        evaluate = TableEvaluator(table, "seed", seed)

        def worth(trial):
            return float(table.rewards(trial.value / 100, trial.cost["parameters"]))

        search = N2N(LAYERS, 200, worth, seed) if strategy == "n2n" else None
        search = search or RandomSearch(table.choices, 200, seed, lambda c: any(c.values()))
        count = 0
        while asked := search.ask(1):
            count += 1
            if table.position(asked[0]) in top:
                return count
            search.tell([evaluate(asked[0])])
        return np.inf

    found = {name: [reached(seed, name) for seed in range(5)] for name in ("n2n", "random")}
    assert max(found["n2n"]) < 60
    assert np.median(found["n2n"]) < np.median(found["random"])


def test_rewards_need_a_teacher():
    with pytest.raises(UsageError, match="the table micro_nars have no teacher"):
        load_table("micro_nars").rewards(0.9, 100)
