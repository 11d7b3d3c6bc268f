"""The parts of the package are layers: each may import itself and those below it."""

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lrt_jax"
ORDER = [
    "setup",
    "data",
    "model",
    "method",
    "training",
    "durability",
    "inference",
    "conversion",
    "evaluation",
    "few_shot",
    "integrations",
    "topology",
    "comparison",
    "run",
    "reporting",
]
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path, source: str) -> set[str]:
    """Dotted names, below ``lrt_jax``, of everything of the package that a file imports anywhere."""
    package = ("lrt_jax", *path.relative_to(PACKAGE).parent.parts)
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return {name.removeprefix("lrt_jax.") for name in names if name.split(".")[0] == "lrt_jax"}


def forbidden(path: Path, source: str) -> set[str]:
    """What a file imports against the rule."""
    place = path.relative_to(PACKAGE).parts
    if len(place) == 1:  # a command, or the package's own __init__: both are on top of all parts
        return set()
    allowed = ORDER[: ORDER.index(place[0]) + 1]
    return {name for name in imported(path, source) if name.split(".")[0] not in allowed}


def test_all_parts_are_in_the_order():
    assert {path.relative_to(PACKAGE).parts[0] for path in FILES if path.parent != PACKAGE} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    assert forbidden(path, path.read_text()) == set()


@pytest.mark.parametrize(
    ("place", "source", "found"),
    [
        ("model/x.py", "from lrt_jax.training import step", {"training.step"}),
        ("model/x.py", "def f():\n    import lrt_jax.inference.decode", {"inference.decode"}),
        ("training/x.py", "from lrt_jax import main, model", {"main"}),
        ("training/x.py", "from ..evaluation import bits_per_byte", {"evaluation.bits_per_byte"}),
        ("training/x.py", "from . import state\nfrom lrt_jax.model import layers\nimport jax", set()),
        ("main.py", "from lrt_jax.evaluation import bits_per_byte", set()),
    ],
)
def test_the_rule_itself(place, source, found):
    assert forbidden(PACKAGE / place, source) == found


def test_no_file_is_called_utils():
    assert not [path for path in FILES if path.stem in ("utils", "util", "helpers", "misc")]


def test_no_file_imports_itself_by_way_of_others():
    """Not for its types either: what is checked needs what checks it, never the other way round."""
    files = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in FILES}
    graph = {}
    for name, path in files.items():
        found = imported(path, path.read_text())
        graph[name] = {one if one in files else one.rpartition(".")[0] for one in found} & files.keys() - {name}
    graphlib.TopologicalSorter(graph).prepare()  # raises a CycleError
