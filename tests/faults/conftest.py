"""The table of the fault suite: one line per fault, printed at the end of the session."""

import pytest
from runs import Place, Run

LINES: list[str] = []


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("faults") / "place")


@pytest.fixture(autouse=True)
def nothing_left():
    """Ends what a failed test has left running, so that it fails alone."""
    yield
    for run in Run.running:
        if run.process.poll() is None:
            run.process.kill()
        run.process.communicate()
    Run.running.clear()


@pytest.fixture
def tell():
    """Adds a line to the table: what was injected, what had to follow, and what did."""

    def add(injected: str, expected: str, seen: str) -> None:
        LINES.append(f"injected: {injected} | expected: {expected} | seen: {seen}")

    return add


def pytest_terminal_summary(terminalreporter):
    if LINES:
        terminalreporter.section("faults")
        for line in LINES:
            terminalreporter.write_line(line)
