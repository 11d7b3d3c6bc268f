"""A trace of some steps, for TensorBoard (xprof) or Perfetto."""

from pathlib import Path
from typing import Any

import jax

from lrt_jax.setup.errors import writing

FOLDER = "profile"
# Steps before the first one that is traced: compilation, and what the first ones meet.
SKIPPED = 3


class Profiler:
    """Traces N steps of a run, once steps run as they will; with N = 0 it does nothing."""

    def __init__(self, workdir: Path, steps: int):
        """Of ``steps`` steps; the trace goes into ``workdir``'s folder ``profile``."""
        self._workdir, self._steps, self._seen, self._tracing = workdir, steps, 0, False

    def before_step(self, state: Any) -> str:
        """Begins or ends the trace where it is time to; only then is ``state``, of the step before, waited for.

        Returns a line to print, mostly empty.

        Raises:
          WorkdirError: the trace cannot be written.
        """
        self._seen += 1
        if self._steps and self._seen == SKIPPED + 1:
            jax.block_until_ready(state)
            with writing(self._workdir):
                jax.profiler.start_trace(self._workdir / FOLDER)
            self._tracing = True
        elif self._seen == SKIPPED + 1 + self._steps:
            return self.end(state)
        return ""

    def end(self, state: Any) -> str:
        """Ends the trace, if one is on; a line to print."""
        if not self._tracing:
            return ""
        jax.block_until_ready(state)
        self._tracing = False
        with writing(self._workdir):
            jax.profiler.stop_trace()
        traced = min(self._seen - SKIPPED, self._steps)
        folder = self._workdir / FOLDER
        return f"{traced} steps traced: tensorboard --logdir={folder}, or python -m benchmarks.trace {folder}"
