import itertools

import pytest

from lrt_jax.inference.text import Reader, complete, encode
from lrt_jax.setup.errors import UserError


class Bytes:
    """A tokenizer whose tokens are single bytes."""

    @staticmethod
    def decode_bytes(ids):
        return bytes(ids)


def read(text, stops=()):
    reader = Reader(Bytes, stops)
    pieces = []
    for token in text if isinstance(text, bytes) else text.encode():
        pieces.append(reader.read(token))
        if reader.stopped:
            break
    return [*pieces, reader.close()], reader.stopped


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("plain text", (), "plain text"),
        ("one two three", ("two",), "one "),
        ("abababac, more", ("abac",), "abab"),  # the stop string begins inside a false start
        ("abab", ("abac",), "abab"),  # a false start at the end is text
        ("xyz", ("z", "yz"), "x"),  # the one that begins first
        ("a\n\nb", ("\n\n", ""), "a"),
        ("día→", ("→",), "día"),
        (b"caf\xc3", (), "caf\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_text_ends_before_the_first_stop_string(text, stops, expected):
    pieces, stopped = read(text, stops)
    assert "".join(pieces) == expected
    assert stopped == any(stop and stop in str(text) for stop in stops)


def test_nothing_of_a_stop_string_and_no_half_character_is_given_out_early():
    pieces, _ = read("ab STOé", ("STOP",))
    assert "".join(pieces) == "ab STOé"
    assert all(so_far in ("", "a", "ab", "ab ", "ab STOé") for so_far in itertools.accumulate(pieces))


def test_a_prompt_that_is_no_text_is_said():
    with pytest.raises(UserError, match=r"the prompt holds '\\udcff', which no UTF-8 text does"):
        encode(Bytes, "good \udcff")  # what Python makes of the byte 0xff on a command line


def test_no_prompts_have_no_completions():
    assert complete(None, [], tokens=3) == []
