"""Files of arrays: NumPy's, PyTorch's and safetensors. Nothing is ever unpickled unsafely."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from lrt_jax.setup.errors import UserError

KINDS = ".npz, .safetensors, .pt, .pth or .bin"
# In a file that also holds results, the parameters' names begin so.
PARAMETERS = "param/"
# Dtypes that float32 holds exactly.
NARROW = ("float16", "bfloat16")


class ConversionError(UserError):
    """Arrays, or the config that came with them, do not fit; one sentence says which."""


@dataclasses.dataclass(frozen=True)
class ArrayFile:
    """What a file holds: arrays, and strings (safetensors metadata, or ``config_json`` of an ``.npz``), by name."""

    arrays: dict[str, np.ndarray]
    metadata: dict[str, str]

    @property
    def parameters(self) -> dict[str, np.ndarray]:
        """The arrays that are parameters: all, unless names say which."""
        marked = {
            name.removeprefix(PARAMETERS): array for name, array in self.arrays.items() if name.startswith(PARAMETERS)
        }
        return marked or self.arrays


def read(path: Path) -> ArrayFile:
    """Reads a file of arrays.

    Raises:
      ConversionError: it is not there, of no known kind, broken, or needs PyTorch where that is not installed.
    """
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors, ".pt": _read_torch, ".pth": _read_torch}
    reader = (readers | {".bin": _read_torch}).get(path.suffix)
    if reader is None:
        raise ConversionError(f"{path} is of no known kind; allowed are {KINDS}")
    if not path.is_file():
        raise ConversionError(f"there is no file {path}")
    return reader(path)


def _read_npz(path: Path) -> ArrayFile:
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it is one array alone, as np.save writes it")
        with file:
            arrays = {name: file[name] for name in file.files}
        if strange := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
            raise ValueError(f"{strange[0]} in it is no array")
    except Exception as error:  # a broken archive raises many kinds
        raise ConversionError(f"{path} is not a readable .npz of plain arrays ({error})") from None
    texts = {name: str(array) for name, array in arrays.items() if array.dtype.kind == "U" and array.ndim == 0}
    return ArrayFile({name: array for name, array in arrays.items() if name not in texts}, texts)


def _read_safetensors(path: Path) -> ArrayFile:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return ArrayFile({name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {})  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, AttributeError, TypeError) as error:  # the latter: an unknown dtype
        raise ConversionError(f"{path} is not a readable safetensors file ({error})") from None


def _read_torch(path: Path) -> ArrayFile:
    try:
        import torch  # type: ignore[import-not-found, unused-ignore]  # not a requirement: large, and needed for this only
    except ModuleNotFoundError:
        raise ConversionError(
            f"{path} is a PyTorch file, and torch is not installed; install it, or convert the file to .safetensors"
        ) from None
    try:
        # Tensors and plain containers only: a file cannot run code.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise ConversionError(f"{path} is not a PyTorch file of plain tensors ({error})") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ConversionError(f"{path} holds no state dict: it must map names to tensors")
    try:
        return ArrayFile({name: _numpy(tensor, torch) for name, tensor in state.items()}, {})
    except (TypeError, RuntimeError) as error:
        raise ConversionError(f"{path} holds a tensor that NumPy cannot ({error})") from None


def _numpy(tensor: Any, torch: Any) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a new file; only when it is whole does it get its name.

    Raises:
      ConversionError: there is such a file already, or it cannot be written.
    """
    if path.suffix != ".safetensors":
        raise ConversionError(f"--out is {str(path)!r}; it must end in .safetensors")
    if path.exists():
        raise ConversionError(f"--out is {str(path)!r}, which is there already; choose another name or remove it")
    unfinished = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        safetensors.numpy.save_file(contiguous, unfinished, dict(metadata))
        unfinished.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ConversionError(f"--out is {str(path)!r}, which cannot be written ({error})") from None


def reference_config(metadata: Mapping[str, str], path: Path) -> dict[str, Any] | None:
    """The authors' config fields that came with the arrays, if any.

    Raises:
      ConversionError: they are not JSON.
    """
    if "config_json" not in metadata:
        return None
    return parse_reference_config(metadata["config_json"], path)


def parse_reference_config(text: str, path: Path) -> dict[str, Any]:
    """The authors' config fields from JSON, at its top or under ``model_config``, as in their checkpoints.

    Raises:
      ConversionError: it is not JSON, or no object.
    """
    try:
        fields = json.loads(text)
        fields = fields.get("model_config", fields)
        return dict(fields)
    except (json.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
        raise ConversionError(f"the reference's config in {path} is not a JSON object ({error})") from None


def widened(name: str, array: np.ndarray) -> np.ndarray:
    """Floats narrower than float32, bfloat16 among them, as float32, which holds each exactly.

    Raises:
      ConversionError: the array holds no floats, or floats that are not finite in float32.
    """
    if array.dtype.name in NARROW:
        array = array.astype(np.float32)
    if array.dtype not in (np.float32, np.float64):
        raise ConversionError(
            f"{name} has the dtype {array.dtype}; allowed are float64, float32, {', '.join(NARROW)} (bfloat16 not in "
            ".npz)"
        )
    with np.errstate(over="ignore"):
        infinite = np.count_nonzero(~np.isfinite(array.astype(np.float32)))
    if infinite:
        raise ConversionError(
            f"{name} has {infinite:,} of {array.size:,} entries that are not finite in float32; all must be finite"
        )
    return array


def check_shapes(arrays: Mapping[str, np.ndarray], allowed: Mapping[str, Sequence[tuple[int, ...]]]) -> None:
    """Checks that the arrays are those of a model, each of one of the shapes that it may have.

    Raises:
      ConversionError: lists every array that is missing, is surplus or has another shape.
    """
    faults = [f"{name} is missing" for name in allowed if name not in arrays]
    faults += [f"{name} is surplus" for name in sorted(arrays.keys() - allowed.keys())]
    faults += [
        f"{name} has shape {arrays[name].shape} instead of {shapes[0]}"
        for name, shapes in allowed.items()
        if name in arrays and arrays[name].shape not in shapes
    ]
    if faults:
        raise ConversionError(f"the arrays do not fit the model config: {'; '.join(faults)}")
