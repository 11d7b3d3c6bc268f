"""Items, prompts, records and statistics of few-shot tasks: all but scores."""

import json
import random
import re

import few_shot_items
import numpy as np
import pytest

from lrt_jax.few_shot import items as items_of
from lrt_jax.few_shot import prompts, record, statistics, tasks
from lrt_jax.few_shot.items import Item
from lrt_jax.few_shot.prompts import Question
from lrt_jax.few_shot.record import Record, Scored
from lrt_jax.few_shot.scorer import Answer
from lrt_jax.few_shot.tasks import FewShotError, Task
from lrt_jax.setup.errors import WorkdirError

COPA, WINOGRAD, DYCK = tasks.chosen(["copa", "winograd", "bigbench_dyck_languages"])


def read(task, folder=None, **options):
    lines = [json.dumps(item) for item in few_shot_items.ITEMS[task.file]]
    said = []
    items = items_of.read(task, task.file, "\n".join(lines).encode(), said.append, **options)
    assert not said and not items.left_out
    return items.asked


def plainly(task: Task, index: int, shots: int) -> list[tuple[list[int], int]]:
    """Tokens of each option and where the scored ones begin, from the published items, step by step."""
    data = list(few_shot_items.ITEMS[task.file])
    random.Random(1337).shuffle(data)
    others = [number for number in range(len(data)) if number != index]
    examples = [data[number] for number in random.Random(1234 + index).sample(others, shots)]
    encode = lambda text: [few_shot_items.trained().bos_id, *map(int, few_shot_items.trained().encode(text))]  # noqa: E731
    text, item = "", data[index]
    if task.kind == "multiple_choice":
        for one in examples:
            text += one["query"] + task.delimiter + one["choices"][one["gold"]] + "\n\n"
        whole = [encode(text + item["query"] + task.delimiter + choice) for choice in item["choices"]]
        same = 0
        while len({tuple(tokens[: same + 1]) for tokens in whole}) == 1:
            same += 1
        return [(tokens, same) for tokens in whole]
    if task.kind == "schema":
        for one in examples:
            text += one["context_options"][one["gold"]] + task.delimiter + one["continuation"] + "\n\n"
        ends = task.delimiter + item["continuation"]
        whole = [encode(text + context + ends) for context in item["context_options"]]
        same = 0
        while len({tuple(tokens[-same - 1 :]) for tokens in whole}) == 1:
            same += 1
        return [(tokens, len(tokens) - same) for tokens in whole]
    for one in examples:
        text += one["context"].strip() + task.delimiter + one["continuation"] + "\n\n"
    text += item["context"].strip() + task.delimiter
    return [(encode(text + item["continuation"]), len(encode(text.strip())))]


@pytest.mark.parametrize("shots", [0, 1])
@pytest.mark.parametrize("task", [COPA, WINOGRAD, DYCK], ids=lambda task: task.kind)
def test_prompts_and_spans_are_those_of_a_plain_implementation(task, shots):
    task = Task(**(vars(task) | {"shots": shots}))
    items = read(task)
    for index in range(len(items)):
        tokens = prompts.encode(few_shot_items.trained(), prompts.texts(task, items, index))
        found = prompts.prompt(task, tokens, context=10_000)
        assert not found.cropped
        expected = plainly(task, index, shots)
        assert len(found.question.options) == len(expected)
        for option, scored, (whole, start) in zip(*found.question[1:], expected, strict=True):
            assert [*found.question.shared, *option] == whole
            assert scored == len(whole) - start
            assert len(option) > scored  # what comes before the first scored token is read beside it


def test_what_all_options_begin_with_is_shared():
    items = read(COPA)
    tokens = prompts.encode(few_shot_items.trained(), prompts.texts(COPA, items, 0))
    question = prompts.prompt(COPA, tokens, context=10_000).question
    assert {len(option) - scored for option, scored in zip(*question[1:], strict=True)} == {1}
    assert len(question.shared) > 5


def test_a_prompt_too_long_for_the_context_keeps_its_last_tokens():
    items = read(DYCK)
    tokens = prompts.encode(few_shot_items.trained(), prompts.texts(DYCK, items, 3))
    whole = prompts.prompt(DYCK, tokens, context=10_000).question
    cropped = prompts.prompt(DYCK, tokens, context=40)
    assert cropped.cropped
    (before,), (after,) = whole.options, cropped.question.options
    np.testing.assert_array_equal([*cropped.question.shared, *after], [*whole.shared, *before][-40:])
    assert whole.scored == cropped.question.scored


def test_options_that_are_cropped_apart_share_nothing_that_they_have_not():
    rows = [np.array([1, *range(5, 30), 40]), np.array([1, *range(5, 30), 41, 42])]
    question = prompts.prompt(COPA, rows, context=20).question
    for option, row in zip(question.options, rows, strict=True):
        np.testing.assert_array_equal([*question.shared, *option], row[-20:])
    assert question.scored == (1, 2)


@pytest.mark.parametrize(
    ("task", "rows", "said"),
    [
        (DYCK, [[1, 5, 6], [1, 5, 9, 7]], "the tokenizer joins the end of the prompt and the beginning of the"),
        (DYCK, [[1, 5, 6], [1, 5, 6]], "the tokenizer joins the end of the prompt and the beginning of the"),
        (DYCK, [[1, 5], [1, 5, *range(20)]], "option 0 alone has 20 tokens; the context has 20"),
    ],
)
def test_what_cannot_be_asked_is_said(task, rows, said):
    with pytest.raises(ValueError, match=said):
        prompts.prompt(task, [np.array(row) for row in rows], context=20)


GOOD = '{"query": "a", "choices": ["b", "c"], "gold": 1}'


@pytest.mark.parametrize(
    ("task", "line", "said"),
    [
        (COPA, "{", "is not JSON"),
        (COPA, "[1]", "is no JSON object"),
        (COPA, "[" * 100_000, "is not JSON"),
        (COPA, '{"query": "a", "choices": ["b"], "gold": 0}', r"choices has 1; it must be a list of two texts or more"),
        (COPA, '{"query": "a", "choices": "bc", "gold": 0}', r"choices is str; it must be a list"),
        (COPA, '{"query": "a", "choices": ["b", null], "gold": 0}', r"choices\[1\] is null; it must be text"),
        (COPA, '{"query": "a", "choices": ["b", " "], "gold": 0}', r"choices\[1\] is empty"),
        (COPA, '{"query": "a", "choices": ["b", "c"], "gold": 2}', "gold is 2; with 2 options allowed are 0 to 1"),
        (COPA, '{"query": "a", "choices": ["b", "c"], "gold": "1"}', 'gold is "1"; with 2 options'),
        (COPA, '{"query": "a", "choices": ["b", "c"]}', "gold is missing"),
        (COPA, '{"query": "", "choices": ["b", "c"], "gold": 0}', "query is empty"),
        (COPA, '{"query": "\\ud800", "choices": ["b", "c"], "gold": 0}', "query holds half of a surrogate pair"),
        (WINOGRAD, '{"context_options": ["a", "b"], "gold": 0}', "continuation is missing"),
        (Task("x", "x", 0, "language_modeling", " ", 0.0), '{"context": "a", "continuation": 3}', "continuation is 3"),
    ],
)
def test_a_bad_line_is_said_and_the_rest_is_read(task, line, said):
    good = {
        "multiple_choice": GOOD,
        "schema": '{"context_options": ["a", "b"], "continuation": "c", "gold": 0}',
        "language_modeling": '{"context": "", "continuation": "b"}',
    }[task.kind]
    lines = []
    items = items_of.read(task, "DIR/x.jsonl", f"{good}\r\n{line}\n\n{good}\n".encode(), lines.append)
    assert (len(items.asked), items.left_out, items.cut) == (2, 1, False)
    assert {item.line for item in items.asked} == {1, 4}
    (line,) = lines
    assert line.startswith("DIR/x.jsonl, line 2: ") and line.endswith("; it is left out")
    assert re.search(said, line)


def test_a_task_needs_more_items_than_shots():
    with pytest.raises(FewShotError, match="10 of its 12 items are asked; bigbench_dyck_languages needs 10 "):
        read(DYCK, most=10)
    with pytest.raises(FewShotError, match="x: it has 1; copa needs 10 solved items and one to ask"):
        items_of.read(Task(**(vars(COPA) | {"shots": 10})), "x", GOOD.encode(), print)


def test_a_cut_is_made_before_shots_are_drawn():
    assert [item.line for item in read(DYCK, most=11)] == [item.line for item in read(DYCK)[:11]]
    text = "\n".join([GOOD] * 3).encode()
    assert [items_of.read(COPA, "x", text, print, most=most).cut for most in (2, 3, 4)] == [True, False, False]


def test_tasks_are_found_in_a_folder_or_in_the_unpacked_bundle(tmp_path):
    few_shot_items.write(tmp_path / "one")
    few_shot_items.write(tmp_path / "two" / "eval_data")
    for folder in ("one", "two"):
        found = dict(tasks.files(tmp_path / folder, tasks.CORE))
        assert {task.label for task, path in found.items() if path} == {COPA.label, WINOGRAD.label, DYCK.label}
    with pytest.raises(FewShotError, match="no folder"):
        list(tasks.files(tmp_path / "three", tasks.CORE))
    with pytest.raises(FewShotError, match=r"no task has a file; there must be world_knowledge/arc_easy\.jsonl"):
        list(tasks.files(tmp_path / "one", tasks.chosen(["arc_easy"])))
    with pytest.raises(FewShotError, match="--tasks has 'arc', which is no task of CORE; allowed are: hellaswag_z"):
        tasks.chosen(["arc"])


def test_core_has_its_22_tasks():
    assert len(set(tasks.LABELS)) == 22
    assert {task.delimiter for task in tasks.CORE} == {" ", "\nAnswer: "}


def scored(number, correct=True, losses=(1.0, 2.0)):
    return Scored(number, number + 1, correct, losses, False, 0, 0)


def opened(folder, **settings):
    return Record(folder, COPA, "data", {"items": 0} | settings)


def test_a_record_goes_on_behind_its_last_good_line(tmp_path):
    first = opened(tmp_path)
    first.add([scored(0), scored(1, False, (float("nan"), 1.0))])
    whole = first.path.read_bytes()
    first.add([scored(2)])
    first.close()
    torn = first.path.read_bytes()
    for cut in range(len(whole) + 1, len(torn)):  # wherever a process was killed
        first.path.write_bytes(torn[:cut])
        again = opened(tmp_path)
        assert sorted(again.items) == [0, 1]
        assert np.isnan(again.items[1].losses[0])
        again.close()
    again = opened(tmp_path)
    again.add([scored(2)])
    again.close()
    assert first.path.read_bytes() == torn
    assert record.read(first.path).keys() == {0, 1, 2}
    first.path.write_bytes(whole[:10])  # not even the first line
    again = opened(tmp_path)
    again.add([scored(5)])
    again.close()
    assert record.header_of(first.path)["settings"] == {"items": 0}
    assert record.read(first.path).keys() == {5}


def test_a_damaged_line_costs_no_other(tmp_path):
    one = opened(tmp_path)
    one.add([scored(0), scored(1), scored(2)])
    one.close()
    lines = one.path.read_bytes().splitlines(keepends=True)
    one.path.write_bytes(b"".join([lines[0], lines[1], b"{" + lines[2], lines[3]]))
    again = opened(tmp_path)
    assert sorted(again.items) == [0, 2]
    again.add([scored(1)])
    again.close()
    assert record.read(one.path).keys() == {0, 1, 2}


def test_two_processes_do_not_write_one_record(tmp_path):
    one = opened(tmp_path)
    with pytest.raises(WorkdirError, match="is being written by another process; wait until that one has ended"):
        opened(tmp_path)
    opened(tmp_path, items=5).close()  # another way of asking is another file
    one.close()
    opened(tmp_path).close()


def test_options_without_a_token_of_their_own_are_judged_as_nanochat_does():
    """The mean over nothing is NaN there, and Python's least of several is NaN only if the first is."""
    for rows, guessed in [([[1, 5, 6], [1, 5, 6, 7]], 0), ([[1, 5, 6, 7], [1, 5, 6]], 0), ([[1, 5], [1, 5]], 0)]:
        prompt = prompts.prompt(COPA, [np.array(row) for row in rows], context=20)
        answer = Answer(np.array([3.0 if count else 0.0 for count in prompt.question.scored]), np.ones(2, bool), 0, 0)
        for gold in (0, 1):
            one = record.scored(COPA, 0, Item(1, (("a", "b"), ("a", "c")), gold), prompt, answer)
            assert one.correct == (gold == guessed)
            assert [np.isnan(loss) for loss in one.losses] == [not count for count in prompt.question.scored]
    same = prompts.prompt(WINOGRAD, [np.array([1, 5, 6])] * 2, context=20)
    assert same.question.scored == (0, 0)


def test_what_scores_depend_on_names_their_file(tmp_path):
    for task in (COPA, WINOGRAD):
        for data in ("a", "b"):
            for settings in ({"items": 0}, {"items": 5}, {"items": 0, "memory": False}):
                Record(tmp_path, task, data, settings).close()
    assert len(list(tmp_path.iterdir())) == 12


def test_intervals_are_those_of_a_bootstrap():
    items = [scored(number, number % 3 == 0) for number in range(60)]
    found = statistics.score(COPA, items, left_out=2)
    assert (found.accuracy, found.items, found.left_out) == (20 / 60, 60, 2)
    assert found.centred == pytest.approx((1 / 3 - 0.5) / 0.5)
    right = np.array([one.correct for one in items], float)
    drawn = np.random.default_rng(0).choice(right, size=(20_000, 60)).mean(axis=1)
    np.testing.assert_allclose(found.interval, np.quantile(drawn, [0.025, 0.975]), atol=0.02)
    assert found.is_a_guess  # a third is less than a half
    right = [statistics.score(COPA, [scored(number, number < 8) for number in range(count)], 0) for count in (8, 12)]
    assert [one.is_a_guess for one in right] == [False, True]
    nothing = statistics.score(DYCK, [scored(0, False)], left_out=0)
    assert nothing.is_a_guess and not statistics.score(DYCK, [scored(0)], left_out=0).is_a_guess


def test_the_mean_is_of_centred_accuracies_and_called_core_only_if_it_is():
    items = {COPA: [scored(0), scored(1, False)], DYCK: [scored(0), scored(1), scored(2), scored(3, False)]}
    value, (low, high) = statistics.mean(items)
    assert value == pytest.approx((0.0 + 0.75) / 2)
    assert low < value < high
    assert statistics.name_of_mean(tasks.LABELS, whole=True) == "CORE"
    part, few = (
        statistics.name_of_mean(tasks.LABELS, whole=False),
        statistics.name_of_mean(["copa", "piqa"], whole=True),
    )
    assert "a part of the items of CORE's 22 tasks, which is not CORE" in part
    assert "2 of CORE's 22 tasks, which is not CORE" in few


def test_two_runs_are_compared_by_mcnemar():
    pairs = [(True, False)] * 8 + [(False, True)] * 2 + [(True, True)] * 5 + [(False, False)] * 5
    found = statistics.compare(pairs)
    assert found[:3] == (20, 8, 2)
    assert found.difference == pytest.approx(6 / 20)
    assert found.p_value == pytest.approx(2 * (1 + 10 + 45) / 2**10)  # exact: at most 2 of 10 the other way
    assert statistics.compare([(True, True)]).p_value == 1.0


def test_a_question_counts_what_it_reads():
    assert Question(np.arange(3), (np.arange(4), np.arange(6)), (1, 2)).longest == 5
