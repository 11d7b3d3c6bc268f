"""Several processes as one run: when JAX's distributed runtime starts, who speaks, and who waits for whom.

One process needs none of this and starts none of it. Several are asked for by flags, by SLURM or Open MPI, by a
TPU pod on GKE (JobSet) or by a TPU VM whose metadata names more than one worker.
"""

import importlib.util
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO, TypeVar

import jax
import numpy as np
from absl import flags
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from lrt_jax.setup.errors import UserError

T = TypeVar("T")

# What SLURM sets within srun, and what jax reads of it.
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
METADATA = "http://{}/computeMetadata/v1/instance/attributes/{}"
METADATA_SECONDS = 2.0


class ProcessError(UserError):
    """The processes of a run do not come together; one sentence says why."""


def define_flags() -> None:
    """Declares the flags of a command that runs on several processes."""
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0; with --num_processes and --process_id.")
    flags.DEFINE_integer("num_processes", None, "How many processes make up the run.")
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
    flags.DEFINE_integer(
        "heartbeat_timeout_seconds", 60, "A process silent for so long is dead, and all others end.", lower_bound=1
    )


def start() -> None:
    """Joins the other processes, where flags or the environment say that there are some.

    Must come before anything that touches a device.

    Raises:
      ProcessError: the flags do not fit together, or the others cannot be reached.
    """
    values = flags.FLAGS
    given = values.coordinator_address, values.num_processes, values.process_id
    check_flags(*given)
    if values.num_processes is None and not asked_for(os.environ):
        return
    try:
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=values.heartbeat_timeout_seconds)
    except (RuntimeError, ValueError) as error:
        where = values.coordinator_address or "the coordinator that the environment names"
        reason = str(error).strip().splitlines()[0]
        raise ProcessError(f"the processes of this run could not meet at {where} ({reason})") from None


def check_flags(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Checks that the three flags are all given, or none, and fit together.

    Raises:
      ProcessError: naming the flag, what was found and what is allowed.
    """
    given = {"--coordinator_address": coordinator_address, "--num_processes": num_processes, "--process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return
    if missing:
        raise ProcessError(
            f"{' and '.join(missing)} must be set too: {', '.join(given)} go together, or all stay unset"
        )
    assert coordinator_address is not None and num_processes is not None and process_id is not None
    host, colon, port = coordinator_address.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
        raise ProcessError(f"--coordinator_address is {coordinator_address!r}; it must be HOST:PORT of process 0")
    if num_processes < 1:
        raise ProcessError(f"--num_processes is {num_processes}; it must be above 0")
    if not 0 <= process_id < num_processes:
        raise ProcessError(
            f"--process_id is {process_id}; with --num_processes={num_processes} allowed are 0 to {num_processes - 1}"
        )


def asked_for(environment: Mapping[str, str]) -> bool:
    """Whether the environment says that this process is one of several; jax then reads the rest by itself."""
    if all(name in environment for name in SLURM):
        return int(environment["SLURM_NTASKS"]) > 1
    if "OMPI_COMM_WORLD_SIZE" in environment:
        return int(environment["OMPI_COMM_WORLD_SIZE"]) > 1
    slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if slices > 1 or hosts:
        return slices > 1 or len((hosts or "").split(",")) > 1
    return _on_tpu_vm(environment) and _tpu_vm_processes(environment) > 1


def _on_tpu_vm(environment: Mapping[str, str]) -> bool:
    """A machine with TPU chips and their library, whose metadata may be asked."""
    chips = any(Path(path).exists() for path in ("/dev/accel0", "/dev/vfio/0"))
    return chips and importlib.util.find_spec("libtpu") is not None and "TPU_SKIP_MDS_QUERY" not in environment


def _tpu_vm_processes(environment: Mapping[str, str]) -> int:
    """Workers times slices, from the metadata of a TPU VM; 1 where there is none."""
    workers = _metadata(environment, "worker-network-endpoints").split(",")
    slices = [
        line.partition(":")[2]
        for line in _metadata(environment, "tpu-env").splitlines()
        if line.startswith("MEGASCALE_NUM_SLICES:")
    ]
    return len(workers) * int(slices[0].strip(" '\"") if slices else 1)


def _metadata(environment: Mapping[str, str], key: str) -> str:
    url = METADATA.format(environment.get("GCE_METADATA_IP", "metadata.google.internal"), key)
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=METADATA_SECONDS) as response:
            return response.read().decode()
    except (urllib.error.URLError, TimeoutError):
        return ""


def started() -> bool:
    """Whether this process is one of several; asks no device."""
    return jax.distributed.is_initialized()


def count() -> int:
    """How many processes make up the run."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this process is the one that prints, and that writes what is written once."""
    return jax.process_index() == 0


def say(text: str = "", end: str = "\n", file: TextIO | None = None) -> None:
    """Prints at once, in the first process only."""
    if is_first():
        print(text, end=end, file=file, flush=True)


def wait(place: str) -> None:
    """Waits until every process has come to ``place``, which names it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


def from_first(make: Callable[[], bytes]) -> bytes:
    """What ``make`` returns in process 0, the only one that calls it, in all of them.

    Raises:
      UserError: ``make`` raised one; the other processes raise a ProcessError.
    """
    if jax.process_count() == 1:
        return make()
    made = together(lambda: make() if is_first() else b"")
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(made))))
    padded = np.frombuffer(made.ljust(length, b"\0"), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes()


def together(work: Callable[[], T]) -> T:
    """``work()`` in every process, which end together: where it fails in one, it fails in all.

    Raises:
      UserError: ``work`` raised one here; or ProcessError: in another process, whose output says why.
    """
    if jax.process_count() == 1:
        return work()
    failure: UserError | None = None
    result: T
    try:
        result = work()
    except UserError as error:
        failure = error
    failed = np.flatnonzero(multihost_utils.process_allgather(np.array(failure is not None)))
    if failure is not None:
        raise failure
    if len(failed):
        raise ProcessError(f"process {failed[0]} could not go on; its output says why")
    return result


def gathered(text: str) -> list[str]:
    """The text of every process, by their numbers, in all of them."""
    raw = np.frombuffer(text.encode(), np.uint8)
    # With their numbers: the devices of a pod, whose order the rows have, need not be in the order of the processes.
    heads = multihost_utils.process_allgather(np.array([jax.process_index(), len(raw)], np.int32)).reshape(-1, 2)
    rows = multihost_utils.process_allgather(np.pad(raw, (0, heads[:, 1].max() - len(raw)))).reshape(len(heads), -1)
    texts = {int(process): bytes(row[:length]).decode() for (process, length), row in zip(heads, rows, strict=True)}
    return [texts[process] for process in sorted(texts)]


def require_same(name: str, values: Mapping[str, Any]) -> None:
    """Checks that all processes were given the same values, nested ones that JSON can hold, called ``name`` together.

    Raises:
      ProcessError: a value differs from the first process's; in all processes the same sentence.
    """
    if count() == 1:
        return
    given = [flatten_dict({name: json.loads(text)}, sep=".") for text in gathered(json.dumps(values))]
    first = given[0]
    for process, found in enumerate(given):
        different = [field for field in first | found if field not in first or first[field] != found.get(field)]
        if different:
            field, more = different[0], len(different) - 1
            also = f" ({more} more field{'s differ' if more > 1 else ' differs'})" if more else ""
            raise ProcessError(
                f"process {process} has {field} {found.get(field)!r}, process 0 has {first.get(field)!r}{also}; all "
                "processes must be given the same"
            )
