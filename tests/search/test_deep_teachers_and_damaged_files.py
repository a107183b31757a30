"""Teachers of very many layers, and files of policies, tables and chains that are damaged."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch

from smallfry.errors import DataError, RunError, UsageError
from smallfry.search import Trial, replay
from smallfry.search.n2n import N2N, Layer, constrained_reward, reward
from smallfry.search.n2n.layer import choices_of
from smallfry.search.n2n.strategy import load_policies
from smallfry.search.n2n.students import Students
from smallfry.search.neuroevolution import DeepGA, SeedChain
from smallfry.search.neuroevolution.deep_ga import Evaluated
from smallfry.search.tables import TableEvaluator, candidates_of, load_table
from smallfry.search.tables.table import ARRAYS, write_table
from smallfry.transforms import ModelSpec, build

# Deep teachers


def deep(count, shares=(0.0, 0.25, 0.5, 1.0)):
    return [Layer(f"layer{n}", shares, outputs=(n + 1) / count) for n in range(count)]


def searched(search):
    trials = []
    while asked := search.ask(4):
        told = [Trial(each, 1 - sum(each.values()) / len(each)) for each in asked]
        search.tell(told)
        trials += told
    return trials


@pytest.mark.parametrize("count", [32, 41, 64])
def test_a_teacher_of_more_students_than_an_integer_holds_is_searched(count):
    # 4³² and 2⁶⁴ students are 0 in 64 bits, and 3⁴¹ a negative number
    search = N2N(deep(count), 12, lambda trial: trial.value)
    trials = searched(search)
    assert len(trials) == 12
    assert search.state_dict()["stage"] == "shrinkage"
    kinds = [{*trial.candidate.values()} for trial in trials]
    assert all(kind <= {0.0, 1.0} for kind in kinds[:3])
    assert any(0.25 in kind or 0.5 in kind for kind in kinds)
    again = N2N(deep(count), 12, lambda trial: trial.value)
    replay(again, trials[:7])
    assert trials[:7] + searched(again) == trials


def test_a_deep_teacher_without_removable_layers_is_shrunk_at_once():
    search = N2N(deep(45, (0.5, 0.75, 1.0)), 6, lambda trial: trial.value)
    assert search.state_dict()["stage"] == "shrinkage"
    trials = searched(search)
    assert len(trials) == 6
    assert all({*t.candidate.values()} <= {0.5, 0.75, 1.0} for t in trials)


@pytest.mark.parametrize("count", [1, 2])
def test_a_teacher_of_few_layers_ends_with_all_of_its_students(count):
    search = N2N(deep(count, (0.0, 0.5, 1.0)), 50, lambda trial: trial.value)
    trials = searched(search)
    assert len(trials) == len({tuple(t.candidate.values()) for t in trials})
    assert len(trials) <= 3**count - 1  # nothing is left of the last one
    assert all(any(t.candidate.values()) for t in trials)
    assert search.ask(1) == []


def test_a_layer_alone_can_not_be_shrunk_by_a_share_given_twice():
    with pytest.raises(UsageError, match="each value once"):
        choices_of([Layer("a", (0.5, 0.5, 1.0))])
    with pytest.raises(UsageError, match="shares are 0 to 1"):
        Layer("a", (float("nan"), 1.0))


@pytest.mark.parametrize("compression", [-1.0, 0.0, 0.3, 1.0])
def test_the_reward_grows_with_accuracy_and_compression_and_falls_with_each_limit(compression):
    assert reward(compression, 0.0) == 0
    if compression < 1:
        assert reward(compression, 1.0) < reward(compression + 1e-3, 1.0)
    values = [constrained_reward(0.8, n, False) for n in range(18)]
    assert values == sorted(values, reverse=True)
    assert values[15:] == [-1.0] * 3
    assert all(constrained_reward(0.8, n, True) == 0.8 for n in range(18))


def test_a_share_of_the_channels_keeps_the_nearest_number_and_at_least_one():
    spec = ModelSpec("vitrm_micro_patch4_8", {"embed_dim": 16, "num_heads": 4, "depth": 1})
    students = Students(build(spec), spec, torch.zeros(2, 1, 8, 8), shares=(0.001, 0.4, 1.0))
    (name,) = [each.name for each in students.layers if "mlp" in each.name]
    whole = {each.name: 1.0 for each in students.layers}
    units = students.build(whole).model.get_submodule("blocks.0.mlp.fc2").in_features
    for share, kept in ((0.001, 1), (0.4, round(0.4 * units))):
        model = students.build({**whole, name: share}).model
        assert model.get_submodule("blocks.0.mlp.fc2").in_features == kept
        assert model(torch.zeros(2, 1, 8, 8)).isfinite().all()
    with pytest.raises(UsageError, match="needs a share for each layer"):
        students.build({name: 0.4})
    with pytest.raises(UsageError, match="shares are 0 to 1"):
        Students(build(spec), spec, torch.zeros(2, 1, 8, 8), shares=(0.5,))


# Policies


def test_policies_come_back_and_a_file_cut_anywhere_is_refused(tmp_path):
    search = N2N(deep(3), 5, lambda trial: trial.value, seed=4)
    searched(search)
    file = tmp_path / "policies.safetensors"
    search.save_policies(file)
    for name, weights in load_policies(file).items():
        expected = search.policies[name].state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], expected[key]) for key in weights)
    content = file.read_bytes()
    for length in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(RunError, match=r"policies\.safetensors: no policies of a search"):
            load_policies(file)


# Tables


@pytest.fixture(scope="module")
def table():
    return load_table("micro_n2n")


def written(table, tmp_path):
    file = tmp_path / "table.npz"
    write_table(file, {name: getattr(table, name) for name in ARRAYS}, {"seeds": [0]})
    return file


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_table_cut_anywhere_is_refused_with_its_name(table, share, tmp_path):
    file = written(table, tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"table\.npz is no table of a search space"):
        load_table("micro_n2n", file)


def test_a_table_with_a_changed_byte_is_refused_wherever_it_is(table, tmp_path):
    file = written(table, tmp_path)
    content = file.read_bytes()
    for place in np.linspace(60, len(content) - 30, 25).astype(int):
        changed = bytearray(content)
        changed[place] ^= 0xFF
        file.write_bytes(bytes(changed))
        try:
            found = load_table("micro_n2n", file)
        except DataError:
            continue
        # a byte that nothing is read of, such as a date
        assert all(np.array_equal(getattr(found, each), getattr(table, each)) for each in ARRAYS)


@pytest.mark.parametrize("record", ["[1, 2]", "3", "null", "{", ""])
def test_a_table_whose_record_is_none_is_refused(table, record, tmp_path):
    file = tmp_path / "table.npz"
    arrays = {name: getattr(table, name) for name in ARRAYS}
    np.savez(file, record=np.array(record), **arrays)
    with pytest.raises(DataError, match=r"table\.npz"):
        load_table("micro_n2n", file)


def test_a_table_of_another_space_or_of_pickled_objects_is_refused(table, tmp_path):
    with pytest.raises(DataError, match="damaged"):
        load_table("micro_nars", written(table, tmp_path))
    file = tmp_path / "objects.npz"
    np.savez(file, **{name: np.array([{}], object) for name in (*ARRAYS, "record")})
    with pytest.raises(DataError, match="no table"):
        load_table("micro_n2n", file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("correct.npy", b"")
    with pytest.raises(DataError, match="no table"):
        load_table("micro_n2n", file)
    stream = io.BytesIO()
    np.save(stream, np.zeros(3))
    file.write_bytes(stream.getvalue())
    with pytest.raises(DataError, match="no table"):
        load_table("micro_n2n", file)


def test_every_candidate_of_a_table_is_at_its_own_place(table):
    assert [table.position(each) for each in table.candidates] == [*range(1023)]
    extended = {**table.candidates[5], "rung": 2}
    assert table.position(dict(reversed(extended.items()))) == 5
    assert candidates_of("micro_n2n") == table.candidates
    assert table.best(0.0).tolist() == [int(table.accuracy.argmax())]
    assert len(table.best(1.0)) == 1023
    with pytest.raises(UsageError, match="not a candidate"):
        table.position({"layer1": 0.3})


def test_an_evaluator_answers_alike_in_any_order(table):
    one, other = TableEvaluator(table, seed=1), TableEvaluator(table, seed=1)
    some = table.candidates[::100]
    assert [one(each) for each in some] == [*reversed([other(each) for each in reversed(some)])]
    trials = [TableEvaluator(table, seed=seed)(some[3]) for seed in range(30)]
    assert {trial.seed for trial in trials} == {0, 1, 2}
    for trial in trials:
        moments = 100 * table.correct[trial.seed, :, 300] / 600
        assert trial.measured["accuracy_by_moment"] == pytest.approx(moments.tolist())
        assert trial.value == pytest.approx(moments[-1])


# Chains of seeds

SIZES = (3, 4, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": [[1, 10**400]]},
        {"steps": [[-1, 0.1]]},
        {"steps": [[1, 0.1, 2]]},
        {"steps": [["1", 0.1]]},
        {"steps": 3},
        {"steps": [[2**63, 0.1]]},
        {"seed": 1.5},
        {"seed": True},
        {"sizes": "34"},
        {"sizes": [3, 0, 2]},
        {"sizes": [3, 4.0]},
        {"sizes": None},
        {"format": None},
    ],
)
def test_a_chain_with_a_wrong_entry_is_refused_by_its_file(change, tmp_path):
    file = tmp_path / "chain.json"
    SeedChain(SIZES, 5, ((6, 0.1),)).save(file)
    assert SeedChain.load(file) == SeedChain(SIZES, 5, ((6, 0.1),))
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(RunError, match=r"chain\.json: no chain of seeds"):
        SeedChain.load(file)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.95])
def test_a_chain_cut_anywhere_is_refused(share, tmp_path):
    file = tmp_path / "chain.json"
    SeedChain(SIZES, 5).child(7, 0.5).save(file, about="a test")
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(RunError, match="no chain of seeds"):
        SeedChain.load(file)


class Ridge:
    """Fitness of the first weight, and a behaviour of all of them."""

    sizes, power, solved, episodes = (2, 2), 0.5, None, 1

    def __call__(self, weights, seed, episodes=1):
        return Evaluated(weights[:, 0].astype(float), weights.astype(float))


@pytest.mark.parametrize("select", ["fitness", "novelty", "random"])
@pytest.mark.parametrize(("population", "parents"), [(1, 1), (3, 3), (6, 1)])
def test_small_populations_have_their_parents_and_the_best_of_all_as_elite(
    select, population, parents
):
    ga = DeepGA(Ridge(), population, parents, select, nearest=2, seed=3)
    found = list(ga.run(6))
    assert [each.number for each in found] == [*range(6)]
    assert [each.evaluations for each in found] == [population * (n + 1) for n in range(6)]
    best = -np.inf
    for each in found:
        best = max(best, each.best)
        assert len(each.parents) == parents
        assert each.elite_fitness == best
        assert ga.chain(each.elite).weights()[0] == np.float32(best)
        if select == "fitness":
            assert each.elite in each.parents
        if select == "random":
            assert all(not steps for _, steps in each.parents)
