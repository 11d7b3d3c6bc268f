"""Whether a checkpoint can be read back: orbax may write all of its files, and not find them again."""

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

Arrays = list[tuple[tuple[int, ...], str]]


def arrays(tree: Any) -> Arrays:
    """Shape and dtype of each array, sorted: the parts of a tree have other names once it is saved."""
    return sorted((tuple(leaf.shape), str(leaf.dtype)) for leaf in jax.tree.leaves(tree))


def fault(folder: epath.Path, saved: dict[str, Arrays]) -> str:
    """Why a restore will not find the arrays of a checkpoint, as a part of a sentence; empty if it will.

    Their values are not read.

    Args:
      folder: the checkpoint's.
      saved: the :func:`arrays` of each item.
    """
    for item, expected in saved.items():
        try:
            found = arrays(ocp.StandardCheckpointHandler().metadata(folder / item).tree)
        except (ValueError, OSError) as error:
            return reason(error)
        if found != expected:
            return f"it has other arrays of {item} than were saved"
    return ""


def reason(error: Exception) -> str:
    """What tensorstore says, without its specification of the array."""
    return str(error).split(" [", 1)[0].partition("\n")[0]
