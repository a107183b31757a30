"""benchmarks/scale_plan.py: what several GPUs would take, on paper, as docs/scale.md shows it."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def paper():
    spec = importlib.util.spec_from_file_location("scale_plan", ROOT / "benchmarks/scale_plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("rank", [None, 64])
def test_the_page_shows_what_the_plan_says(paper, rank):
    found = paper.plan(paper.SUBJECTS[0], rank, paper.Card())
    page = (ROOT / "docs" / "scale.md").read_text()
    for line in paper.table(found).splitlines():
        assert line in page, line


def test_refreshes_as_often_as_recommended_take_a_tenth_of_the_time(paper):
    found = paper.plan(paper.SUBJECTS[0], None, paper.Card())
    for row in found.rows:
        share = row.refresh / (row.refresh + row.every * row.step)
        assert share <= paper.SHARE + 1e-9
        oftener = row.refresh / (row.refresh + (row.every - 1) * row.step)
        assert row.every == 1 or oftener > paper.SHARE


def test_no_number_of_gpus_makes_inversions_shorter_than_the_costliest_block(paper):
    card = paper.Card()
    found = paper.plan(paper.SUBJECTS[0], None, card)
    alone, *_, most = (row.inversions for row in found.rows)
    assert alone == pytest.approx(found.total / card.solver)
    assert most == pytest.approx(found.largest / card.solver)
