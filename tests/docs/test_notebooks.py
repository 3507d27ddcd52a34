"""The notebooks run from top to bottom, and are committed without outputs."""

from __future__ import annotations

import shutil

import pytest

from tests.docs.pages import ROOT


NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def nbformat():
    pytest.importorskip("nbclient", reason="needs the extra docs")
    pytest.importorskip("ipykernel", reason="needs the extra docs")
    return pytest.importorskip("nbformat", reason="needs the extra docs")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook, nbformat, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # As in the repository: the data stands where the notebook looks for it.
    folder = tmp_path / "examples" / "notebooks"
    folder.mkdir(parents=True)
    shutil.copytree(ROOT / "examples" / "data", tmp_path / "examples" / "data")
    content = nbformat.read(notebook, as_version=4)
    NotebookClient(content, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in content.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)
    assert "student int8" in shown and "change_pin" in shown
    accuracies = [
        float(cell.outputs[-1]["data"]["text/plain"])
        for cell in content.cells
        if cell.cell_type == "code" and cell.source.endswith('["eval_accuracy"]')
    ]
    assert len(accuracies) == 2 and min(accuracies) > 0.7  # ten intents: chance is 0.1


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_without_outputs(notebook, nbformat):
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    assert cells and not any(cell.outputs or cell.execution_count for cell in cells)
