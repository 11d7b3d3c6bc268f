"""What a SentencePiece model does to text before it looks for pieces, read from the model itself.

Text that is tried shows what is done to that text only. Python classes for the model come with the library, but need
the very protobuf that they were made with; here a few fields of the message are read by its wire format.
"""

from collections.abc import Iterator

NORMALIZER = 3  # the field of the model, a message
NAME, CHARACTER_MAP = 1, 2  # its fields
DUMMY_PREFIX, REMOVE_SPACES, ESCAPE_SPACES = 3, 4, 5  # which are 1 where they miss
VARINT, FIXED_64, BYTES, FIXED_32 = 0, 1, 2, 5  # kinds of values


def changes(model: bytes) -> list[str]:
    """What a serialized model may change in text that it encodes, in words; empty: nothing.

    Raises:
      ValueError: it is no such message.
    """
    parts = [value for field, value in _fields(model) if field == NORMALIZER and isinstance(value, bytes)]
    found = dict(_fields(b"".join(parts)))  # messages in parts are one
    name = found.get(NAME, b"")
    named = f" ({name.decode(errors='replace')})" if isinstance(name, bytes) and name else ""
    what = {
        f"its normalizer rewrites or deletes characters{named}": bool(found.get(CHARACTER_MAP)),
        "it puts a space in front": bool(found.get(DUMMY_PREFIX, 1)),
        "it removes spaces": bool(found.get(REMOVE_SPACES, 1)),
        "it does not mark spaces": not found.get(ESCAPE_SPACES, 1),
    }
    return [change for change, is_so in what.items() if is_so]


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Number and value of each field of a message, in order: the last one counts."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        field, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _varint(data, at)
            yield field, value
            continue
        length = {FIXED_64: 8, FIXED_32: 4}.get(kind)
        if kind == BYTES:
            length, at = _varint(data, at)
        if length is None or at + length > len(data):
            raise ValueError(f"byte offset {at} of a message is beyond its end, or of no kind")
        yield field, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, and where it ends."""
    value = shift = 0
    while at < len(data):
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("a number goes on beyond the end")
