"""The picture of the architecture shows the imports of the source, and its page every package."""

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from markdown_blocks import ROOT

DOCS = ROOT / "docs"
HOUSE = ROOT / "src" / "smallfry"
PACKAGES = {
    path.stem
    for path in HOUSE.iterdir()
    if (path.suffix == ".py" or (path / "__init__.py").is_file()) and not path.stem.startswith("_")
} | {"smallfry_runtime"}


@pytest.fixture(scope="module")
def picture():
    spec = spec_from_file_location("architecture", DOCS / "pictures" / "architecture.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def graph(picture):
    return picture.packages()


def test_every_package_is_in_the_graph_and_on_the_page(graph):
    assert set(graph) == PACKAGES
    page = (DOCS / "architecture.md").read_text()
    listed = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)))
    assert set(listed) == PACKAGES - {"version"}
    assert len(listed) == len(set(listed))


def test_imports_are_those_of_the_source(graph):
    assert "curvature" in graph["optim"]
    assert "models" in graph["training"]
    assert graph["smallfry_runtime"] == frozenset()


def test_arrows_that_are_left_out_are_implied_by_others(picture):
    graph = {"a": {"b", "c", "d"}, "b": {"c"}, "c": {"d"}, "d": set(), "e": {"d"}}
    drawn = picture.without_detours({name: frozenset(others) for name, others in graph.items()})
    assert drawn == {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": set(), "e": {"d"}}


def test_boxes_do_not_overlap_and_arrows_point_down(picture, graph):
    at = picture.places(graph)
    assert set(at) == PACKAGES - {"version"}
    places = list(at.values())
    for i, (x, y) in enumerate(places):
        for other_x, other_y in places[:i]:
            assert abs(x - other_x) > picture.BOX[0] or abs(y - other_y) > picture.BOX[1]
    for name, others in graph.items():
        assert all(at[other][1] < at[name][1] for other in others - {"version"})


def test_the_script_draws_the_picture_of_the_page(picture, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["architecture", "--out", str(tmp_path)])
    picture.main()
    assert [file.name for file in tmp_path.iterdir()] == ["architecture.png"]
    assert "(pictures/architecture.png)" in (DOCS / "architecture.md").read_text()
