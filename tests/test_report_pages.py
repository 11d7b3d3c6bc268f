"""The page of a report: what is on it, what it is written over, and how it looks in a real browser."""

import dataclasses
import json
import os
import re
import shutil

import browser
import pytest
from reports import Elements, rows_of, write_run

from lrt_jax import report
from lrt_jax.comparison import results
from lrt_jax.comparison.results import Result
from lrt_jax.reporting import files
from lrt_jax.reporting.runs import ReportError
from lrt_jax.setup.config import Config, DataConfig, TrainConfig

NAMES = {'learning rate <b>&" $x$': "&lt;b&gt;&amp;&quot; $x$"}


@pytest.fixture(scope="module")
def config(tiny):
    return Config(tiny(), TrainConfig(batch_size=8, steps=200), DataConfig(corpus="/nowhere"))


@pytest.fixture(scope="module")
def two(tmp_path_factory, config):
    """The report of two runs, of whose metrics one is twice as fast; one's name is no good HTML."""
    place = tmp_path_factory.mktemp("two")
    other = dataclasses.replace(config, seed=7)
    first = write_run(place / "first", rows_of(200, evaluations=(100, 200)), config)
    second = write_run(place / next(iter(NAMES)), rows_of(200, speed=2000.0, evaluations=(200,)), other)
    report_of_few_shot(first)
    return report.write([first, second], place / "out", 0, None, with_model=False)


def report_of_few_shot(folder):
    task = {"task": "copa", "accuracy": 0.5, "interval": [0.4, 0.6], "chance": 0.5}
    place = folder / "few_shot" / "step_200-sequential"
    place.mkdir(parents=True)
    text = json.dumps({"mean": {"name": "mean of 1", "value": 0.0}, "tasks": [task]})
    (place / "report-1.json").write_text(text)
    (place / "report-2.json").write_text("{}")


@pytest.fixture(scope="module")
def swept(tmp_path_factory, config):
    """The report of a sweep: two variants, two budgets, two seeds."""
    place = tmp_path_factory.mktemp("swept")
    for variant, better in (("plain", 1.0), ("other", 0.75)):
        for budget in (1e6, 2e6):
            for seed in (0, 1):
                bpb = 3 * (budget / better) ** -0.05
                folder = place / f"{variant}_{budget:.4g}_{seed}"
                write_run(folder, rows_of(200, evaluations=(200,), bpb=bpb), dataclasses.replace(config, seed=seed))
                about = {"variant": variant, "budget": budget, "seed": seed, "tokens": int(budget), "seconds": 1.0}
                scores = {"bpb": bpb, "bpb_merged": bpb, "bpb_init": bpb}
                one = Result(**about, **scores, effective_tokens=budget, parameters=1000)
                results.write(folder, one)
    (place / "results.json").write_text('{"baseline": "plain", "saved": NaN}')
    return report.write([place], place / "report", 0, None, with_model=False)


class Empty:
    """A page without charts."""

    charts, looks = (), {}

    def html(self):
        return "anew"


def test_only_reports_are_written_over(two, tmp_path):
    out = shutil.copytree(two.parent, tmp_path / "copy")
    files.check(out)  # an earlier report
    (out / "note.txt").touch()
    files.write(out, Empty())
    assert sorted(path.name for path in out.iterdir()) == ["index.html", "note.txt"]
    assert (out / "index.html").read_text() == "anew"
    with pytest.raises(ReportError, match=r"whose index\.html is not of a report"):
        files.check(out)
    (tmp_path / "plot.png").write_bytes(b"PNG")
    with pytest.raises(ReportError, match=r"whose plot\.png is not of a report"):
        files.check(tmp_path)
    with pytest.raises(ReportError, match="is a run's work dir"):
        files.check(two.parents[1] / "first")


@pytest.fixture(scope="module")
def text_of_two(two):
    return two.read_text()


def test_the_page_of_two_runs_has_all_of_it(text_of_two, two):
    page = Elements(text_of_two)
    for escaped in NAMES.values():
        assert escaped in text_of_two and '<b>&"' not in text_of_two
    for said in ("finished, 200 steps", "2.0200", "19,200", "copa", "50.0 % (40.0 to 60.0)", "1 of ", "fields differ"):
        assert said in page.text, said
    assert "report-2.json is no report" in page.text
    references = [value for _, attrs in page.found for name, value in attrs.items() if name in ("src", "href")]
    assert references and all(value.startswith(("#", "data:,")) for value in references)
    assert not {"script", "img", "iframe", "object"} & {tag for tag, _ in page.found}
    ids = [attrs["id"] for _, attrs in page.found if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in references if value.startswith("#")} <= set(ids)
    drawn = sum(tag == "svg" for tag, _ in page.found)
    assert drawn == len(list(two.parent.glob("*.png"))) == 17


def test_the_page_of_a_sweep_compares_at_equal_compute(swept):
    page = Elements(swept.read_text())
    assert "Sweep swept" in page.text and "8 runs of the sweep" in page.text and "25.0 ± 0.0 %" in page.text
    assert {tag: 1 for tag, attrs in page.found if attrs.get("aria-label") == "Bits per byte at equal compute"}
    assert "0 or 1" in page.text  # the seeds of a variant


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    """A browser; where none is installed there is nothing to see, unless LRT_BROWSER_REQUIRED says that there must."""
    if browser.executable() is None:
        missing = "no chromium is installed, so no page was rendered"
        pytest.fail(missing) if os.environ.get("LRT_BROWSER_REQUIRED") == "1" else pytest.skip(missing)
    profile = tmp_path_factory.mktemp("profile")
    with browser.started(profile) as one:
        yield one


PAGES = ("two", "swept")
CHARTS = """[...document.querySelectorAll("figure svg")].filter(svg => svg.checkVisibility()).map(svg => {
    const box = svg.getBoundingClientRect(), curves = svg.querySelector("[id$=axes_1]").getBoundingClientRect();
    return [box.width, box.height, box.left, box.right, curves.width, curves.height]})"""


@pytest.mark.parametrize("width", [360, 390, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_every_chart_is_there_and_nothing_overflows(window, request, name, width):
    window.open(request.getfixturevalue(name), width)
    assert window.evaluate("document.documentElement.scrollWidth") <= width
    shown = window.evaluate(CHARTS)
    assert len(shown) >= 8
    for box_width, height, left, right, *curves in shown:
        assert box_width > 250 and height > 150 and min(curves) > 100 and left >= 0 and right <= width
    sizes = window.evaluate("""[...document.querySelectorAll("figure svg text")].filter(text => text.checkVisibility())
        .map(text => text.getBoundingClientRect()).map(box => Math.max(box.width, box.height))""")
    assert min(sizes) > 8


def test_tabs_change_the_axis_without_a_script(window, two):
    window.open(two, 1280)
    visible = (
        """[...document.querySelectorAll(".panel")].filter(one => one.checkVisibility()).map(one => one.classList[2])"""
    )
    assert window.evaluate(visible) == ["steps"]
    window.evaluate('document.querySelector("label[for=x-time]").click()')
    assert window.evaluate(visible) == ["time"]


def test_it_is_readable_in_the_dark_and_on_paper(window, two, swept):
    colors = """[["body", "backgroundColor"], ["figure svg text", "fill"]].map(([one, name]) =>
        getComputedStyle(document.querySelector(one))[name])"""
    found = []
    for dark in (False, True):
        window.open(two, 1280, dark=dark)
        found.append([sum(map(int, re.findall(r"\d+", color)[:3])) / 765 for color in window.evaluate(colors)])
    (paper, ink), (night, chalk) = found
    assert paper - ink > 0.5 and chalk - night > 0.5
    for page in (swept, two):
        window.open(page, 688)  # A4 without its margins
        window.call("Emulation.setEmulatedMedia", media="print")
        assert window.evaluate("document.documentElement.scrollWidth") <= 688
        assert all(right <= 688 for _, _, _, right, *_ in window.evaluate(CHARTS))
    pdf = window.pdf()
    assert pdf.startswith(b"%PDF") and 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 8


def test_no_request_leaves_a_page(window, two, swept):
    window.requested.clear()
    window.open(two, 1280)
    window.open(swept, 1280)
    assert window.requested and all(url.startswith(("file:", "data:")) for url in window.requested), window.requested
    # Nor could one: the page's own policy refuses it before there is any.
    tried = """new Promise(done => {
        document.addEventListener("securitypolicyviolation", event => done(event.blockedURI));
        const image = new Image();
        image.onerror = () => setTimeout(done, 500, "it was asked for");
        image.src = "http://127.0.0.1:9/x.png" })"""
    answer = window.call("Runtime.evaluate", expression=tried, awaitPromise=True, returnByValue=True)
    assert answer["result"]["value"] == "http://127.0.0.1:9/x.png"
