"""The tour runs from a clean kernel, and is committed as it ran."""

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

TOUR = Path(__file__).parents[1] / "notebooks" / "tour.ipynb"


@pytest.fixture(scope="module")
def tour():
    return nbformat.read(TOUR, as_version=4)


def pictures(notebook):
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


@pytest.mark.filterwarnings("ignore")  # a kernel is a process of its own; what it warns of is not ours
def test_the_tour_executes_from_a_clean_kernel(tour, monkeypatch, tmp_path):
    monkeypatch.setenv("LRT_TOUR_SMALL", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(TOUR.parents[1]))
    fresh = nbformat.from_dict(tour)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    NotebookClient(fresh, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert pictures(fresh) == 3
    printed = "".join(output.get("text", "") for cell in fresh.cells for output in cell.get("outputs", []))
    assert "gzip -9" in printed and "LRT, memory zeroed" in printed


def test_the_tour_is_committed_with_its_outputs(tour):
    code = [cell for cell in tour.cells if cell.cell_type == "code"]
    assert pictures(tour) == 3
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # once, in order, all of them
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]


def test_the_tour_begins_with_its_badge_and_defines_plots_only(tour):
    assert tour.cells[0].source.startswith("[![Open In Colab]")
    assert "lrt-jax/blob/main/notebooks/tour.ipynb" in tour.cells[0].source
    for cell in tour.cells:
        if cell.cell_type == "code":
            source = cell.source.replace("%pip install", "pass  # ")
            for node in ast.walk(ast.parse(source)):
                assert not isinstance(node, ast.ClassDef | ast.Lambda)
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
def test_the_tour_installs_the_jax_of_the_runtime(tour, monkeypatch, there, build):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True if name in there else None)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    source = next(cell.source for cell in tour.cells if "%pip install" in cell.source)
    installed = []
    exec(re.sub(r'%pip install -q "{jax_build}".*', "installed.append(jax_build)", source), {"installed": installed})
    assert installed == ([build] if build else [])
