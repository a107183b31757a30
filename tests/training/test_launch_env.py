"""What the environment says of how a process was started, and how processes meet."""

import os
import socket
from datetime import timedelta

import pytest

from smallfry.cli import main
from smallfry.errors import TrainingError, UsageError
from smallfry.optim.collectives import Collectives
from smallfry.training import cluster, started
from smallfry.training.launch_env import LAUNCHER, Launch, launch, launcher_has_ended, rank
from smallfry.training.processes import start

STEP = {
    **{"SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"},
    **{"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"},
    **{"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "gpu[07-08],gpu12"},
    **{"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"},
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Set variables, and nothing else that says how this process was started."""
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    for name in list(os.environ):
        if name in (*torchrun, "MASTER_PORT", LAUNCHER) or name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(started, "_at_a_terminal", lambda: False)

    def put(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


def test_torchrun_says_all(environment):
    environment(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4")
    assert launch() == Launch("torchrun", 5, 8, 1, 4)
    assert launch().nodes == 2
    assert cluster.Cluster(launch()).node_rank() == 1


@pytest.mark.parametrize(
    "left_over",
    [{}, {"RANK": "3"}, {"RANK": "x"}, {"WORLD_SIZE": "2"}, {"RANK": "", "WORLD_SIZE": "2"}],
)
def test_half_of_torchruns_variables_mean_nothing(environment, left_over):
    environment(**left_over)
    assert launch() == Launch("")
    assert rank() == 0


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "set LOCAL_RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": " "}, "set LOCAL_RANK"),
        ({"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"}, "WORLD_SIZE"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "a contradiction"),
        (
            {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
            "as many on each",
        ),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "3,1"}, "unevenly"),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "5"}, "unevenly"),
    ],
)
def test_what_can_not_be_is_refused(environment, variables, part):
    environment(**variables)
    with pytest.raises(UsageError, match=part):
        launch()
    assert rank() == 0


def test_a_step_of_slurm_needs_no_tasks_per_node(environment):
    environment(**STEP)
    found = launch()
    assert found == Launch("slurm", 3, 4, 1, 2)
    assert cluster.address(found) == "gpu07"


def test_each_step_of_each_job_has_its_own_port(environment):
    ports = set()
    for job in ("123456", "123457", "133456"):
        for step in ("0", "1"):
            environment(**{**STEP, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step})
            ports.add(cluster.port(launch()))
    assert len(ports) == 6
    assert all(1024 < port < 32768 for port in ports)
    environment(MASTER_PORT="4711")
    assert cluster.port(launch()) == 4711


def test_a_shell_in_a_step_is_alone(environment, monkeypatch):
    environment(**STEP)
    monkeypatch.setattr(started, "_at_a_terminal", lambda: True)
    assert launch() == Launch("")


def test_a_process_in_an_allocation_trains_alone(environment):
    environment(SLURM_JOB_ID="1", SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_LOCALID="0")
    assert start("cpu", "32-true", "auto").count == 1


def test_who_never_comes_is_not_waited_for_without_end(environment, monkeypatch):
    monkeypatch.setattr(cluster, "MEETING", timedelta(seconds=1))
    monkeypatch.setattr(cluster, "_store", None)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    environment(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
    with pytest.raises(TrainingError, match=f"2 processes to meet at 127.0.0.1, port {port}"):
        start("cpu", "32-true", "auto")


def test_a_process_knows_that_its_launcher_is_gone(environment):
    assert not launcher_has_ended()
    environment(**{LAUNCHER: str(os.getppid())})
    assert not launcher_has_ended()
    environment(**{LAUNCHER: str(os.getpid())})
    assert launcher_has_ended()


def test_only_train_works_in_several_processes(environment, capsys):
    environment(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
    assert main(["models"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    environment(RANK="1", LOCAL_RANK="1")
    assert main(["models"]) == 2
    assert capsys.readouterr().err == ""


def test_processes_in_a_file_are_for_the_launcher_alone(environment, monkeypatch, tmp_path):
    from smallfry.training import launch as launching

    file, seen = tmp_path / "config.yaml", []
    file.write_text("processes: 2\n")
    arguments = ["train", "--config", str(file)]
    monkeypatch.setattr("smallfry.cli.train.run", lambda _: seen.append("train") or 0)
    monkeypatch.setattr(
        launching, "run_in_processes", lambda given, n: seen.append((list(given), n)) or 0
    )
    assert main(arguments) == 0
    environment(**{LAUNCHER: str(os.getppid())})
    assert main(arguments) == 0
    assert seen == [(arguments, 2), "train"]


def test_who_is_no_member_of_a_group_is_refused(monkeypatch):
    from torch import distributed as dist

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda group: -1)
    with pytest.raises(UsageError, match="member"):
        Collectives(object())
