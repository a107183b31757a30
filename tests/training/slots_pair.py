"""What two processes do for ``test_slots_in_processes.py``: a run, whole and in parts."""

import os
import sys
from pathlib import Path

import torch
from grey_pictures import draw_nothing
from run_helpers import StopAt

import smallfry  # noqa: F401  registers the models
from smallfry.errors import Stopped
from smallfry.training import conclusion
from smallfry.training.config import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from smallfry.training.train import resume, train

STEPS = 9
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
torch.set_num_threads(1)
conclusion.draw_run = draw_nothing


def config(name):
    return TrainConfig(
        data=DataConfig("sudoku4", options={"extra_clues": 4, "puzzles": 40}),
        model=ModelConfig(
            options={"embed_dim": 16, "mlp_hidden_dim": 16, "token_hidden_dim": 16},
            recursion_steps=2,
        ),
        task="puzzle",
        objective=ObjectiveConfig(supervision_steps=3, exploration=0.5),
        optimizer=OptimizerConfig("adam_atan2", lr=1e-2, decay="all", clip=None),
        epochs=4,
        batch_size=8,
        progress="quiet",
        device="cpu",
        run=folder / name,
    )


if __name__ == "__main__":
    train(config("whole"))
    try:
        train(config("parts"), StopAt(STEPS))
    except Stopped:
        (folder / f"stopped-{rank}.txt").touch()
    resume(folder / "parts")
