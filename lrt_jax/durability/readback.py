"""Reading a checkpoint back, or not: orbax may write all of its files and not find them again, or a run remove them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from lrt_jax.durability import inventory

Arrays = list[tuple[tuple[int, ...], str]]


def arrays(tree: Any) -> Arrays:
    """Shape and dtype of each array, sorted: the parts of a tree have other names once it is saved."""
    return sorted((tuple(leaf.shape), str(leaf.dtype)) for leaf in jax.tree.leaves(tree))


def fault(folder: epath.Path, saved: dict[str, Arrays]) -> str:
    """Why a restore will not find the arrays of a checkpoint, as a part of a sentence; empty if it will.

    ``saved`` has the :func:`arrays` of each item. Their values are not read.
    """
    for item, expected in saved.items():
        try:
            found = arrays(ocp.StandardCheckpointHandler().metadata(folder / item).tree)
        except (ValueError, OSError) as error:
            return reason(error)
        if found != expected:
            return f"it has other arrays of {item} than were saved"
    return ""


def params(workdir: epath.PathLike, abstract: dict[str, Any], step: int) -> dict[str, jax.Array]:
    """The parameters of a step, in the shardings of ``abstract``, for readers: a run may be saving beside them.

    Raises:
      CheckpointError: orbax cannot read them.
    """
    folder = inventory.folder_of(workdir, step)
    with restoring(folder), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "params", abstract)


@contextlib.contextmanager
def restoring(folder: epath.Path) -> Iterator[None]:
    """Within, what keeps orbax from reading ``folder`` ends in one sentence.

    Raises:
      CheckpointError: it cannot be read.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, ValueError | OSError) and type(error) is not Exception:  # orbax raises plain ones
            raise
        raise inventory.CheckpointError(
            f"{folder} cannot be restored ({reason(error)}), though its files are what was saved; go back to another "
            "step with python -m lrt_jax.checkpoints"
        ) from error


def reason(error: Exception) -> str:
    """What tensorstore says, without its specification of the array."""
    return str(error).split(" [", 1)[0].partition("\n")[0]
