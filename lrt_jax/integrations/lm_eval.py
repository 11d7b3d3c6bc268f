"""lm-evaluation-harness on our models, with the memory: ``pip install lm_eval``, then

    python -m lrt_jax.integrations.lm_eval run --model lrt --model_args workdir=DIR --tasks lambada_openai

The harness's own command line, with the model ``lrt`` known to it. Its arguments are ``workdir``, ``step``, ``scoring``
(``sequential`` or ``fixed_point``) and ``memory`` (``False`` zeroes it). One process; all of its devices.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from lrt_jax.inference import load
from lrt_jax.integrations.requests import Answers
from lrt_jax.setup import schema
from lrt_jax.setup import workdir as workdirs
from lrt_jax.setup.config import Prefill
from lrt_jax.setup.errors import UserError


@register_model("lrt")
class LRT(LM):
    """A run's model as the harness asks it."""

    def __init__(
        self,
        workdir: str,
        step: int | None = None,
        scoring: str = "",
        memory: bool = True,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ):
        """Loads the model of a work dir; the harness's ``batch_size``, ``max_batch_size`` and ``device`` do nothing.

        Raises:
          UserError: there is no such checkpoint, or an argument is none that is allowed.
        """
        super().__init__()
        del batch_size, max_batch_size, device
        trained = load.load(Path(workdirs.local(workdir)), step)
        how = trained.config.scoring
        if scoring:
            how = dataclasses.replace(how, prefill=schema.checked(Prefill, scoring, "scoring"))
        self._answers = Answers(trained, how, use_memory=schema.checked(bool, memory, "memory"))

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """ln p(continuation | context) of each request, and whether greedy decoding would give it."""
        return self._answers.loglikelihood([request.args for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """ln p of each whole text."""
        return self._answers.loglikelihood_rolling([request.args[0] for request in requests])

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The text that continues each context."""
        return self._answers.generate_until([request.args for request in requests])


if __name__ == "__main__":
    try:
        cli_evaluate()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
