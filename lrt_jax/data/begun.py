"""Whether a corpus is the one that a run began with: by its files' names below its root, and their sizes.

So it may be moved, or spelled in another way. And which files of a folder are read, and how, has changed; a run goes on
as it began.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import NoReturn

from etils import epath

from lrt_jax.data import files, kinds
from lrt_jax.data.faults import DataError
from lrt_jax.data.files import File, Found


@dataclasses.dataclass(frozen=True)
class Begun:
    """What is known of the files that complete tokens were made of.

    Attributes:
      sizes: the bytes of each, by its name; None where they were not known.
      as_before: the tokens are of before files were read by :func:`kinds.kind_of`, so by :func:`kinds.kind_before`.
      binding: other files are refused; else they are read.
    """

    sizes: dict[str, int | None]
    as_before: bool = False
    binding: bool = True

    def files_of(self, found: Found, source: str, has_no_part: Callable[[File], bool]) -> tuple[File, ...]:
        """The files that ``found`` has of these, under the names of these.

        One that ``has_no_part``, since it is left out whole, was not noted. ``source`` is the corpus, for errors.

        Raises:
          DataError: they are others, in number, name or size.
        """
        now = {file.name: file.path for file in found.files if file.name in self.sizes or not has_no_part(file)}
        if now.keys() == self.sizes.keys():
            return tuple(file for file in found.files if file.name in now)
        same = self._as_before(now, found.root) if self.as_before else None
        same = same or self._renamed(now)
        if same is None and self.binding:
            self._refuse(now, found.root, source)
        return same or found.files

    def _renamed(self, now: dict[str, str]) -> tuple[File, ...] | None:
        """The files, if their names differ in the folders that all have in common, or there is but one."""
        names, names_before = _below_common(list(now)), _below_common(list(self.sizes))
        if names.keys() != names_before.keys():
            return None
        sizes = files.sizes(now.values())
        for name in names:
            before, size = self.sizes[names_before[name]], sizes[now[names[name]]]
            if before != size or size is None:
                return None
        return tuple(sorted(File(names_before[name], now[names[name]]) for name in names))

    def _as_before(self, now: dict[str, str], root: str) -> tuple[File, ...] | None:
        """The files, if all are there, and what is new would not have been read then."""
        if any(kinds.taken_before(name) for name in now.keys() - self.sizes.keys()):
            return None
        paths = {name: now.get(name) or str(epath.Path(root) / name) for name in self.sizes}
        sizes = files.sizes(paths.values())
        if any(sizes[paths[name]] != size or size is None for name, size in self.sizes.items()):
            return None
        return tuple(sorted(File(name, path) for name, path in paths.items()))

    def _refuse(self, now: dict[str, str], root: str, source: str) -> NoReturn:
        more, gone = sorted(now.keys() - self.sizes.keys()), sorted(self.sizes.keys() - now.keys())
        if self.as_before:  # what is read otherwise now is not what is wrong
            more = [name for name in more if kinds.taken_before(name)]
            sizes = files.sizes(str(epath.Path(root) / name) for name in gone)
            gone = [name for name, size in zip(gone, sizes.values(), strict=True) if size is None]
        parts = [
            f"{len(names):,} {what}, such as {names[0]}" for what, names in (("more", more), ("gone", gone)) if names
        ]
        raise DataError(
            f"config.data.corpus is {source!r}, which has other files than when this run began "
            f"({'; '.join(parts) or 'another size'}); it may be moved and spelled otherwise, but must hold the same "
            "files: put them back, or begin anew in another --workdir, if with these parameters by `python -m "
            "lrt_jax.convert export`, then `import`"
        )


def _below_common(names: list[str]) -> dict[str, str]:
    """Names by what is left of them without the folders that all lie in; of one alone, by its suffix."""
    if len(names) == 1:
        return {kinds.suffix_of(names[0]): names[0]}
    folders = [name.rpartition("/")[0] for name in names]
    common = os.path.commonpath(folders) if all(folders) else ""
    return {name.removeprefix(common + "/") if common else name: name for name in names}
