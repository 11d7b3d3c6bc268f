"""Every notebook runs from a clean kernel, and is committed as it ran."""

import ast
import importlib.util
import re
import shutil
import warnings
from pathlib import Path

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Jupyter's own, on import
    import nbformat
    from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
# Of each notebook how many pictures it draws, and something that it prints.
NOTEBOOKS = {
    "inside": (9, "to the right of their reader that anything was read from: 0"),
    "state_tracking": (2, "answers go on from …"),
    "tour": (3, "LRT, memory zeroed"),
}


@pytest.fixture(scope="module", params=NOTEBOOKS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def notebook(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def check_outputs(name, notebook):
    pictures, said = NOTEBOOKS[name]
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == pictures
    assert said in "".join(output.get("text", "") for output in outputs)


def test_all_notebooks_are_tested():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NOTEBOOKS)


@pytest.mark.filterwarnings("ignore")  # a kernel is a process of its own; what it warns of is not ours
def test_a_notebook_executes_from_a_clean_kernel(name, notebook, monkeypatch, tmp_path):
    monkeypatch.setenv("LRT_TOUR_SMALL", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    fresh = nbformat.from_dict(notebook)
    for cell in code(fresh):
        cell.outputs, cell.execution_count = [], None
    NotebookClient(fresh, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    check_outputs(name, fresh)


def test_a_notebook_is_committed_with_its_outputs(name, notebook):
    check_outputs(name, notebook)
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))  # once, in order, all of them
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]


def test_a_notebook_begins_with_its_badge_and_defines_plots_only(name, notebook):
    assert notebook.cells[0].source.startswith("[![Open In Colab]")
    assert f"lrt-jax/blob/main/notebooks/{name}.ipynb)" in notebook.cells[0].source
    for cell in code(notebook):
        for node in ast.walk(ast.parse(cell.source.replace("%pip install", "pass  # "))):
            assert not isinstance(node, ast.ClassDef | ast.Lambda | ast.AsyncFunctionDef)
            if isinstance(node, ast.FunctionDef):
                assert node.name.startswith("plot_")


@pytest.mark.parametrize(
    ("there", "build"),
    [
        ((), "jax"),
        (("nvidia-smi",), "jax[cuda12]"),
        (("nvidia-smi", "jax_cuda13_plugin"), "jax[cuda13]"),
        (("libtpu",), "jax[tpu]"),
        (("lrt_jax", "nvidia-smi"), None),
    ],
)
def test_a_notebook_installs_the_jax_of_the_runtime(notebook, monkeypatch, there, build):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True if name in there else None)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    source = next(cell.source for cell in notebook.cells if "%pip install" in cell.source)
    installed = []
    exec(re.sub(r'%pip install -q "{jax_build}".*', "installed.append(jax_build)", source), {"installed": installed})
    assert installed == ([build] if build else [])
