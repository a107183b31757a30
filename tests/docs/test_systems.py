"""docs/systems.md is complete, and what works is there and has a command that is understood."""

import re
import shlex
from typing import NamedTuple

import pytest
from markdown_blocks import ROOT, check

PAGE = ROOT / "docs" / "systems.md"
HEAD = ("system", "paper", "home", "status", "command", "reported", "measured")
NONE = "–"
SYSTEMS = """
ViTRM; ViTRM's tables; ViTRM's ablations; TRM; Exact natural gradient; KFAC; EKFAC; KPSVD;
Deflation; Lanczos; KFAC-corrected; Two-level KFAC; SNGD with Fisher layers; Deep Fisher Networks;
CCT; DHVT; SimpleNet; TinyNet; FBNetV3; NARS; ULSAM; Bias loss and SkipblockNet; Gated residual
block; Quantization (survey); BiPer; Probabilistic-circuit compression; HESSO and CRIC; OTOv3;
SortedNet; Sparseland; TSCNC; CompactifAI; A-priori CP convolutions; Compacter; SNNK; ECR; N2N;
Self-tuning networks; Deep GA; Principles of deep learning theory; Neural collapse; Wide and deep
optimal classifiers; Robustness lottery; DeepPeep; CRNN; Interpretable EEG CNN; Real-time semantic
stereo; UAV perception; CheckerPose; Spiking place recognition; MgNO; Lie-group equivariant
networks; DFT density guess; NeuralGS; PIGEON/Hector; Symbolic synthesis (G-SSNN); OpenVINO;
ExecuTorch; LiteRT
"""
LISTED = [" ".join(name.split()) for name in SYSTEMS.split(";")]


class Row(NamedTuple):
    """A line of a table."""

    system: str
    paper: str
    home: str
    status: str
    command: str
    reported: str
    measured: str

    @property
    def files(self) -> list[str]:
        return re.findall(r"`([^`]+)`", self.home)


def tables() -> list[list[str]]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


ROWS = [Row(*cells) for cells in tables() if len(cells) == len(HEAD) and cells[0] != HEAD[0]]


def exists(file: str) -> bool:
    return (ROOT / "src" / "smallfry" / file).exists() or (ROOT / file).exists()


def test_every_table_has_the_same_columns():
    heads = [tuple(cells) for cells in tables() if cells[0] == HEAD[0]]
    assert len(heads) == PAGE.read_text().count("\n## ")
    assert set(heads) == {HEAD}
    ruled = [cells for cells in tables() if set("".join(cells)) == set("|-")]
    assert len(tables()) == len(ROWS) + len(heads) + len(ruled)


@pytest.mark.parametrize("system", LISTED)
def test_every_system_of_the_list_has_a_row(system):
    assert [row for row in ROWS if row.system == system or row.system.startswith(f"{system}, ")]


def test_there_are_no_other_rows_and_none_twice():
    names = [row.system for row in ROWS]
    assert len(set(names)) == len(names)
    assert {name.split(",")[0] for name in names} <= set(LISTED)


@pytest.mark.parametrize("row", ROWS, ids=[row.system for row in ROWS])
def test_what_works_is_there_and_what_is_planned_is_not(row):
    assert row.status in ("works", "planned")
    assert row.files
    there = [file for file in row.files if exists(file)]
    if row.status == "works":
        assert there == row.files
    else:
        assert there != row.files, f"{row.system} has been built: say so, with its command"
        assert (row.command, row.measured) == (NONE, NONE)


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.status == "works"], ids=lambda row: row.system
)
def test_what_works_has_a_command_and_figures_that_lead_to_theirs(row):
    (command,) = re.findall(r"^`([^`]+)`$", row.command)
    check(shlex.split(command))
    assert row.measured == NONE or re.search(r"\]\([\w/]+\.md", row.measured)


def test_papers_are_linked_by_their_own_numbers():
    for row in ROWS:
        for shown, linked in re.findall(
            r"\[([^]]+)\]\(https://arxiv\.org/abs/([^)]+)\)", row.paper
        ):
            assert shown == linked
            assert re.fullmatch(r"\d{4}\.\d{5}", linked)
