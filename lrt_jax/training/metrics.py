"""Where metrics go: metrics.jsonl, TensorBoard, and the terminal."""

import json
import sys
import time
from pathlib import Path

import tensorboardX
import tqdm

FILE = "metrics.jsonl"
# Without a terminal (a log file), a line at most every so many seconds.
SECONDS_BETWEEN_LINES = 10.0


class Writer:
    """Writes metrics of a run to its work dir, and its progress to the terminal."""

    def __init__(self, workdir: Path, first_step: int, steps: int):
        """Opens the files for appending.

        Args:
          workdir: where they lie.
          first_step: steps done before; what TensorBoard has of later ones is hidden.
          steps: the run's length.
        """
        self._jsonl = (workdir / FILE).open("a")
        self._tensorboard = tensorboardX.SummaryWriter(str(workdir), purge_step=first_step, flush_secs=10)
        self._terminal = sys.stderr.isatty()
        self._last_line = 0.0
        self._bar = tqdm.tqdm(
            total=steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=not self._terminal,
            bar_format="{n_fmt}/{total_fmt} {bar} {postfix} [{elapsed} gone, {remaining} left]",
        )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends metrics, by the names of docs/DESIGN.md, for the state after ``step`` steps."""
        self._jsonl.write(json.dumps({"step": step, **metrics}) + "\n")
        self._jsonl.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)

    def progress(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """Shows step, loss, tokens/s and time left."""
        self._bar.set_postfix_str(f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s", refresh=False)
        self._bar.update(step - self._bar.n)
        now = time.monotonic()
        if not self._terminal and (now - self._last_line > SECONDS_BETWEEN_LINES or step == self._bar.total):
            self._last_line = now
            self.line(
                f"step {step:,}/{self._bar.total:,}  loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  "
                f"{tqdm.tqdm.format_interval(seconds_left)} left"
            )

    def line(self, text: str) -> None:
        """Prints a line without breaking the progress bar."""
        tqdm.tqdm.write(text, file=sys.stderr if self._terminal else sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Flushes and closes everything."""
        self._bar.close()
        self._tensorboard.close()
        self._jsonl.close()


class Silent(Writer):
    """The writer of every process but the first: it writes and says nothing."""

    def __init__(self) -> None:
        """Opens nothing."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Leaves metrics to the first process."""

    def progress(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """Shows nothing."""

    def line(self, text: str) -> None:
        """Prints nothing."""

    def close(self) -> None:
        """Has nothing to close."""
