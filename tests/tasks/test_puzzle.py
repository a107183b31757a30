"""The task puzzle: losses and scores, files, and a run from training to the printed steps."""

import json
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from smallfry.cli import main
from smallfry.data import load_data
from smallfry.data.generators.sudoku import Boxes, Sudoku
from smallfry.deploy.export import export
from smallfry.errors import DataError, Stopped, UsageError
from smallfry.models import TRM
from smallfry.report.puzzles import draw_puzzles
from smallfry.tasks import HasDefaults, ReadsText, create_task
from smallfry.tasks.puzzle import Puzzle, cell_losses, log_stablemax
from smallfry.training.augment import Normalize, Place
from smallfry.training.augment_grids import GridAugment
from smallfry.training.checkpoint import load_checkpoint
from smallfry.training.config import (
    AugmentConfig,
    DataConfig,
    EMAConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from smallfry.training.evaluation import predict, score, score_steps
from smallfry.training.progress import QuietReporter
from smallfry.training.puzzle_inference import solve
from smallfry.training.run import RunFolder, load_run
from smallfry.training.train import resume, train
from smallfry_runtime.decoders.puzzle import puzzle_texts, text_of_grid
from smallfry_runtime.runtime import Runtime

SYMBOLS = ("_", ".", "1", "2", "3", "4")
GIVEN = ["1...", "..3.", ".4..", "...2"]


class Stop(QuietReporter):
    left = 6

    def step(self, loss, images_per_second):
        self.left -= 1
        if self.left == 0:
            raise Stopped(2, "by the test")


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMALLFRY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def config():
    sizes = {"embed_dim": 16, "mlp_hidden_dim": 16, "token_hidden_dim": 16}
    return TrainConfig(
        data=DataConfig("sudoku4", options={"extra_clues": 4, "puzzles": 40}),
        model=ModelConfig(options=sizes, recursion_steps=3),
        task="puzzle",
        objective=ObjectiveConfig(supervision_steps=3, exploration=0.5),
        optimizer=OptimizerConfig("adam_atan2", lr=1e-2, decay="all", clip=None),
        ema=EMAConfig(0.9),
        epochs=4,
        batch_size=8,
        threads=1,
        checkpoint_seconds=0.0,
        progress="quiet",
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("puzzle") / "run"
    train(replace(config, run=folder))
    return folder


def test_loss_and_scores_leave_padding_out():
    torch.manual_seed(0)
    outputs = torch.randn(3, 4, 6)
    labels = torch.tensor([[2, 3, 4, 5], [2, 3, 0, 0], [5, 5, 5, 5]])
    wanted = [
        -torch.stack(
            [log_stablemax(outputs[i, c].double())[k] for c, k in enumerate(row) if k]
        ).mean()
        for i, row in enumerate(labels.tolist())
    ]
    assert_close(cell_losses(outputs, labels), torch.stack(wanted))
    assert_close(Puzzle().loss(outputs, labels), torch.stack(wanted).mean())
    sure = torch.nn.functional.one_hot(labels, 6) * 9.0
    sure[1, 2:] = torch.randn(2, 6)  # padding, whatever it is
    sure[2, 0] = -sure[2, 0]
    found = Puzzle().metrics(sure, labels)
    assert Puzzle().right(sure, labels).tolist() == [True, True, False]
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["cell_accuracy"] == pytest.approx(9 / 10)
    assert Puzzle().rank(found) == (found["accuracy"], found["cell_accuracy"], -found["loss"])
    assert Puzzle().decode(sure, "#.abcd")[0] == ["ab", "cd"]


def test_the_task_refuses_what_it_does_not_have():
    task = create_task("puzzle")
    assert isinstance(task, ReadsText)
    assert isinstance(task, HasDefaults)
    assert task.outputs(6) == 6
    with pytest.raises(UsageError, match="leave out label_smoothing"):
        create_task("puzzle", 0.1)
    with pytest.raises(UsageError, match=r"name generated puzzles, such as data\.name sudoku6"):
        task.targets(torch.zeros(3), torch.zeros(3, 2))


@pytest.mark.parametrize(
    "text",
    [
        "1...\n..3.\n.4..\n...2\n",
        "; a comment\n1.....3..4.....2\r\n",
        '["1.....3..4.....2"]',
        '["1...", "..3.", ".4..", "...2"]',
        '{"puzzle": "1...\\n..3.\\n.4..\\n...2"}',
        "[[[1,0,0,0],[0,0,3,0],[0,4,0,0],[0,0,0,2]]]",
        "1___\n--3-\n 4  \n0002",
    ],
)
def test_puzzles_are_read_from_text_and_json(text):
    grids = Puzzle().read(text, SYMBOLS, 4)
    assert grids.dtype == torch.uint8
    assert [text_of_grid(grid.flatten().tolist(), SYMBOLS) for grid in grids] == [GIVEN]


def test_several_puzzles_are_read_and_faults_are_named():
    both = "\n".join(GIVEN) + "\n\n" + "\n".join(GIVEN) + "\n"
    assert len(puzzle_texts(both, 4)) == 2
    assert len(puzzle_texts("1.....3..4.....2\n" * 3, 4)) == 3
    for text, said in (
        ("", "0 puzzles: expected 1 to"),
        ("1...\n..3.\n\n.4..\n...2", "puzzle 1: 2 lines, expected 4"),
        ("1...\n..3.\n.4..\n...", "puzzle 1: 15 symbols, and the model takes 4×4 = 16"),
        ("1...\n..3.\n.4..", "puzzle 1: 12 symbols"),
        ("[1", "not JSON"),
        ('{"other": 1}', "expected a list of puzzles"),
        ("1...\n..3.\n.4..\n...9", "puzzle 1: unknown symbol '9'; expected . 1 2 3 4"),
    ):
        with pytest.raises(DataError, match=said.replace(".", r"\.")):
            Puzzle().read(text, SYMBOLS, 4)


def test_training_batches_are_symmetric_images():
    data = load_data("sudoku4", options={"puzzles": 20, "extra_clues": 4})
    augment = GridAugment(data.symmetries, 6, Normalize((0.0,), (1 / 255,)), Puzzle().targets)
    images, labels = data.train.images, data.train.labels
    torch.manual_seed(3)
    batch = augment(images, labels)
    assert_close(batch.inputs, batch.inputs.round())
    assert (batch.inputs.flatten(1) != images.flatten(1)).any()
    open_cells = batch.inputs.flatten(1) == 1
    assert_close(batch.inputs.flatten(1)[~open_cells].long(), batch.targets[~open_cells])
    assert torch.equal(open_cells.sum(1), (images.flatten(1) == 1).sum(1))
    torch.manual_seed(3)
    place = Place(torch.arange(2, 5), len(images))
    part = augment(images[2:5], labels[2:5], place)  # as of one of several processes
    assert torch.equal(part.inputs, batch.inputs[2:5])
    assert torch.equal(part.targets, batch.targets[2:5])
    assert augment.needed(slice(2, 5), 9).rows.tolist() == [2, 3, 4]
    still = GridAugment(None, 6, augment.normalize, Puzzle().targets)(images, labels)
    assert torch.equal(still.inputs, images.float())


def test_a_run_has_its_scores(run, config):
    folder, trained = RunFolder(run), load_run(run)
    assert isinstance(trained.model, TRM)
    assert trained.manifest["model"]["name"] == "trm_sudoku4_micro"  # auto
    assert trained.manifest["data"]["generated"]["extra_clues"] == 4
    data = load_data("sudoku4", options=config.data.options)
    found = predict(trained.model, data.test, trained.normalize)
    measured = folder.read_summary()["measured"]
    assert score(found, Puzzle()) == pytest.approx(measured["test"], abs=1e-5)
    steps = score_steps(trained.model, data.test, trained.normalize, Puzzle(), batch_size=3)
    assert len(steps) == 3
    assert steps[-1] == pytest.approx(measured["test"], abs=1e-5)
    with pytest.raises(UsageError, match="Linear does not recur"):
        score_steps(torch.nn.Linear(1, 1), data.test, trained.normalize, Puzzle())
    rows = folder.read_metrics()
    assert 0 < rows[-1]["train_halting"] < 1
    assert "validation_cell_accuracy" in rows[-1]


def test_a_stopped_run_goes_on_to_the_bit(run, config, tmp_path):
    folder = tmp_path / "parted"
    with pytest.raises(Stopped):
        train(replace(config, run=folder), Stop())
    (carry,) = load_checkpoint(folder / "last").trainer["objective"][0]["carries"]
    assert carry["steps"].max() > 1
    resume(folder)
    wanted = load_run(run).model.state_dict()
    for name, weight in load_run(folder).model.state_dict().items():
        assert torch.equal(weight, wanted[name])


def test_a_run_is_a_start_for_other_puzzles(run, config, tmp_path):
    other = replace(config.data, options={"extra_clues": 2, "puzzles": 36, "seed": 1})
    begun = replace(config.model, start=str(run), options={})
    train(replace(config, data=other, model=begun, epochs=1, run=tmp_path / "run"))
    assert load_run(tmp_path / "run").spec.architecture == load_run(run).spec.architecture
    assert load_run(tmp_path / "run").manifest["input"] == load_run(run).manifest["input"]


def test_the_command_evaluates_by_step_and_solves_files(run, tmp_path, capsys):
    assert main(["evaluate", str(run), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["steps"]) == 3
    assert result["steps"][-1]["accuracy"] == pytest.approx(result["accuracy"])
    assert main(["evaluate", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "cell accuracy" in printed
    assert printed.splitlines()[-1].split()[0] == "3"
    file = tmp_path / "puzzle.txt"
    file.write_text("\n".join(GIVEN))
    assert main(["predict", str(run), str(file), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert (found["given"], found["puzzle"]) == (GIVEN, 1)
    assert found["answer"] == found["steps"][-1]["answer"]
    trained = load_run(run)
    (solved,) = solve(trained, file.read_text())
    logits = trained.model.recurse(Puzzle().read(file.read_text(), SYMBOLS, 4).float())
    assert [step.answer for step in solved.steps] == [
        text_of_grid(step.logits.argmax(-1)[0].tolist(), SYMBOLS) for step in logits
    ]
    (early,) = solve(trained, file.read_text(), exit_threshold=0.0)
    assert len(early.steps) == 1
    assert main(["predict", str(run), str(file)]) == 0
    printed = capsys.readouterr().out
    assert "given" in printed
    assert "step 3" in printed
    assert main(["predict", str(run), str(tmp_path / "none.txt"), str(file)]) == 1
    said = capsys.readouterr()
    assert "none.txt" in said.err
    assert "step 3" in said.out


@pytest.mark.slow
@pytest.mark.parametrize("form", ["whole", "anytime"])
def test_the_runtime_solves_puzzles_as_pytorch_does(run, tmp_path, capsys, form, quiet_warnings):
    place = export(run, tmp_path / "export", form=form)
    file = tmp_path / "puzzle.txt"
    file.write_text("\n".join(GIVEN))
    (solved,) = solve(load_run(run), file.read_text())
    assert main(["predict", str(place), str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == solved.steps[-1].answer
    assert main(["predict", str(place), str(file)]) == 0
    assert "\n".join(solved.steps[-1].answer) in capsys.readouterr().out
    pixels = Puzzle().read(file.read_text(), SYMBOLS, 4).numpy()
    assert Runtime(place).decode(pixels) == [solved.steps[-1].answer]
    assert main(["predict", str(place), str(file), "--csv", str(tmp_path / "a.csv")]) == 2


def test_images_and_their_settings_are_refused(config, tmp_path):
    fresh = replace(config, run=tmp_path / "run")
    with pytest.raises(UsageError, match="holds symbols, not images: leave out augment"):
        train(replace(fresh, augment=AugmentConfig(mixup=0.0)))
    with pytest.raises(UsageError, match=r"leave out data\.mean"):
        train(replace(fresh, data=replace(config.data, mean=[0.5], std=[0.5])))
    with pytest.raises(UsageError, match="name generated puzzles"):
        train(replace(fresh, data=DataConfig(limit=100), model=ModelConfig("vitrm_micro_patch4_8")))
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("last"))


def test_pictures_are_drawn(tmp_path):
    puzzle = Sudoku(Boxes(2, 2)).draw(0, 0)
    grids, solutions = (torch.from_numpy(part)[None] for part in puzzle[:2])
    answers = solutions.flatten(1).long().clone()
    answers[0, 3] = 2 + (answers[0, 3] - 1) % 4
    draw_puzzles(grids, solutions.flatten(1).long(), answers, SYMBOLS, tmp_path / "puzzles.png")
    data = load_data("sudoku4", options={"puzzles": 20, "extra_clues": 4})
    (tmp_path / "run").mkdir()
    Puzzle().draw(torch.randn(len(data.test), 16, 6), data.test, data.classes, tmp_path / "run")
    (tmp_path / "run" / "puzzles.png").rename(tmp_path / "drawn.png")
    (tmp_path / "run").rmdir()
    assert min(file.stat().st_size for file in tmp_path.iterdir()) > 1000


@pytest.mark.slow
def test_side_four_is_learned_in_400_steps(tmp_path):
    """Measured 98.3 % after 360 steps; no test puzzle is a symmetric image of another."""
    summary = train(
        TrainConfig(
            data=DataConfig("sudoku4", options={"puzzles": 300, "extra_clues": 2}),
            task="puzzle",
            objective=ObjectiveConfig(supervision_steps=4),
            optimizer=OptimizerConfig(
                "adam_atan2",
                lr=3e-3,
                weight_decay=0.1,
                decay="all",
                clip=None,
                options={"bias_correction": "inside", "scale": 1.27},
            ),
            ema=EMAConfig(0.99),
            epochs=60,
            batch_size=32,
            threads=1,
            run=tmp_path / "run",
            progress="quiet",
        )
    )
    assert summary["measured"]["test"]["accuracy"] >= 0.9
