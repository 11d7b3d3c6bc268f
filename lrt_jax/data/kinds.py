"""What a file's name says about it: how it is read, and whether another tool left it behind for itself."""

from typing import Literal

from lrt_jax.data import compressed

Kind = Literal["text", "jsonl", "parquet"]
SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "text": (".txt", ".md", ".py"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),  # which compresses by itself
}
TITLES: dict[Kind, str] = {"text": "text", "jsonl": "JSON Lines", "parquet": "Parquet"}
ALLOWED = (
    f"allowed are {', '.join(suffix for kind in SUFFIXES.values() for suffix in kind)}; all but .parquet also with "
    f"{' or '.join(compressed.SUFFIXES)} behind"
)
# What data engines, file systems and archivers keep beside data, of which nothing is read.
OF_TOOLS = {"_delta_log", "_change_data", "_temporary", "_SUCCESS", "_spark_metadata", "_symlink_format_manifest"}
OF_TOOLS |= {"_metadata", "_logs", "__pycache__", "__MACOSX", "lost+found", "@eaDir", "$RECYCLE.BIN"}
OF_TOOLS |= {"System Volume Information"}


def kind_of(name: str) -> Kind | None:
    """How a file of this name is read; None where its suffix is not listed."""
    base = uncompressed(name.lower())
    for kind, suffixes in SUFFIXES.items():
        if base.endswith(suffixes) and (kind != "parquet" or base == name.lower()):
            return kind
    return None


def kind_before(name: str) -> Kind:
    """The same as it was for tokens that do not say how: what was not known was text."""
    if name.endswith(".parquet"):
        return "parquet"
    return "jsonl" if name.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl") else "text"


def taken_before(name: str) -> bool:
    """Whether a file of this name was read then, where it lay in a folder."""
    if name.endswith((".gz", ".zst")):
        return uncompressed(name).endswith((".txt", ".md", ".py", ".jsonl"))
    return name.endswith((".txt", ".md", ".py", ".jsonl", ".parquet"))


def uncompressed(name: str) -> str:
    """The name without the suffix of what compressed the file."""
    return next((name[: -len(by)] for by in compressed.SUFFIXES if name.lower().endswith(by)), name)


def suffix_of(name: str) -> str:
    """How a file's name ends, with what compressed it, in lower case; "" where it has no suffix."""
    last = name.rpartition("/")[2].lower()
    base = uncompressed(last)
    _, dot, end = base.rpartition(".")
    return (dot + end if dot else "") + last[len(base) :]


def is_hidden(name: str) -> bool:
    """Whether a file or folder is one that tools hide, by its own name."""
    return name.startswith(".")


def is_of_a_tool(name: str, kind: Kind | None) -> bool:
    """Whether a file is not a user's, by its path: in or by a name above, or records beside a data engine's files.

    Such engines begin with an underscore what is no data; so do programmers, whose text is read. ``_day=1`` is data.
    """
    parts = name.split("/")
    if not OF_TOOLS.isdisjoint(parts):
        return True
    return kind in ("jsonl", "parquet") and any(part.startswith("_") and "=" not in part for part in parts)
