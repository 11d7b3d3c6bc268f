"""A few real items of CORE's three kinds, as published (COPA, Winograd, BIG-bench), and a tokenizer for them."""

import functools
import json
from pathlib import Path

from lrt_jax.data import tokenizer
from lrt_jax.data.tokenizer import Tokenizer

VOCAB = 330
ITEMS = {
    "commonsense_reasoning/copa.jsonl": [
        {
            "query": "The man turned on the faucet, therefore",
            "gold": 1,
            "choices": ["the toilet filled with water.", "water flowed from the spout."],
        },
        {
            "query": "The girl found a bug in her cereal, therefore",
            "gold": 1,
            "choices": ["she poured milk in the bowl.", "she lost her appetite."],
        },
        {
            "query": "The woman retired, therefore",
            "gold": 0,
            "choices": ["she received her pension.", "she paid off her mortgage."],
        },
    ],
    "language_understanding/winograd_wsc.jsonl": [
        {
            "context_options": [
                f"The city councilmen refused the demonstrators a permit because the {who}"
                for who in ("city councilmen", "demonstrators")
            ],
            "continuation": f"{what} violence.",
            "gold": gold,
        }
        for gold, what in enumerate(("feared", "advocated"))
    ],
    "symbolic_problem_solving/bigbench_dyck_languages.jsonl": [
        {
            "context": "Complete the rest of the sequence, making sure that the parentheses are closed properly. \n\n"
            f"Input: {opened}\nOutput:",
            "continuation": closed,
        }
        for opened, closed in [
            ("< < [ ( ) ] >", ">"),
            ("[ { [", "] } ]"),
            ("{ < > {", "} }"),
            ("( < >", ")"),
            ("[ ] (", ")"),
            ("< (", ") >"),
            ("{ }  [", "]"),
            ("( (", ") )"),
            ("< { }", ">"),
            ("{", "}"),
            ("[ <", "> ]"),
            ("( [ ]", ")"),
        ]
    ],
}


def write(folder: Path) -> Path:
    """The items as a folder of tasks."""
    for name, items in ITEMS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


@functools.cache
def trained() -> Tokenizer:
    """A tokenizer of VOCAB tokens, made of the items."""
    return Tokenizer(tokenizer.train([json.dumps(ITEMS, ensure_ascii=False)], VOCAB))
