"""Notebooks are executed, and show progress, scores and pictures."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_a_notebook_is_stored_without_outputs(file):
    cells = [each for each in json.loads(file.read_text())["cells"] if each["cell_type"] == "code"]
    assert cells
    assert not any(each["outputs"] or each["execution_count"] for each in cells)


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_a_notebook_runs_and_shows_its_results(file, tmp_path, monkeypatch):
    nbclient, nbformat = (pytest.importorskip(name) for name in ("nbclient", "nbformat"))
    pytest.importorskip("ipykernel")
    monkeypatch.delenv("CI", raising=False)  # under which runs are quiet
    notebook = nbformat.read(file, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=where).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    printed = "".join(out.get("text", "") for out in outputs)
    assert "epoch 2/2" in printed
    shown = "".join(out.get("data", {}).get("text/html", "") for out in outputs)
    assert shown.count("data:image/png") >= 2
    assert "accuracy" in shown
    assert not [out for out in outputs if out["output_type"] == "error"]
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "summary.json").is_file()
