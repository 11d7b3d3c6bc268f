"""What documents and docstrings point to is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = sorted(path for part in ("lrt_jax", "configs", "benchmarks", "tests") for path in (ROOT / part).rglob("*.py"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
# What a docstring cites: METHOD.md, "Backbone", "Recurrent memory".
CITATION = re.compile(r'METHOD\.md((?:,\s+"[^"]+")*)')
# What a document says of the code: `model/memory.py: gates`, `project`.
NAMED = re.compile(r"`((?:[\w/]+/)?\w+\.py): ([\w.]+)`((?:, `[\w.]+`)*)")


def sections(text: str) -> set[str]:
    """The headings of a document."""
    return set(re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE))


def anchors(text: str) -> set[str]:
    """The headings as links name them."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in sections(text)}


def names(path: Path) -> set[str]:
    """What a file defines: functions, classes, constants, and a class's methods and fields as ``Class.name``."""

    def of(body: list[ast.stmt], before: str = "") -> set[str]:
        found = set()
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(before + node.name)
                found |= of(node.body, f"{node.name}.") if isinstance(node, ast.ClassDef) else set()
            targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
            found |= {before + target.id for target in targets if isinstance(target, ast.Name)}
        return found

    return of(ast.parse(path.read_text()).body)


def test_every_citation_of_the_method_names_a_section_of_it():
    method = sections((ROOT / "docs/METHOD.md").read_text())
    cited = {
        (path.name, section)
        for path in CODE
        for cited in CITATION.findall(path.read_text())
        for section in re.findall(r'"([^"]+)"', cited)
        if path.name != Path(__file__).name
    }
    assert len(cited) > 10
    assert {section for _, section in cited} <= method, cited
    assert not [
        path.name for path in CODE if re.search(r"\bmethod\.md", path.read_text()) and path.name != Path(__file__).name
    ]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file) if file else path
        assert there.exists(), target
        assert not anchor or anchor in anchors(there.read_text()), target


@pytest.mark.parametrize(
    "path", [path for path in DOCUMENTS if path.name in ("METHOD.md", "DESIGN.md")], ids=lambda path: path.name
)
def test_code_that_a_document_names_is_there(path):
    named = NAMED.findall(path.read_text())
    assert len(named) > 5
    for file, first, more in named:
        there = [
            found for found in (ROOT / file, ROOT / "lrt_jax" / file, ROOT / "lrt_jax/method" / file) if found.exists()
        ]
        assert there, file
        for name in [first, *re.findall(r"[\w.]+", more)]:
            assert name in names(there[0]) or name.endswith(".py"), f"{file}: {name}"
