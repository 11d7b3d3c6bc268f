"""Import, export and verify weights.

python -m lrt_jax.convert import FILE --out=DIR [--reference_config=FILE] [--config=FILE] [--tokenizer=FILE]
python -m lrt_jax.convert export DIR --out=FILE.safetensors [--step=N] [--names=lrt_jax|reference]
python -m lrt_jax.convert verify FILE.npz [--precision=float64|float32] [--tolerance=X]
"""

import base64
import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from lrt_jax.conversion import files, parity, reference
from lrt_jax.conversion.files import ConversionError
from lrt_jax.conversion.reference import from_reference, to_reference
from lrt_jax.data import tokenizer as tokenizers
from lrt_jax.durability import binding, checkpoint
from lrt_jax.inference import load
from lrt_jax.model import costs
from lrt_jax.model.parameters import table
from lrt_jax.setup import config as configs
from lrt_jax.setup import flags as command_line
from lrt_jax.setup import workdir as workdirs
from lrt_jax.setup.config import Config, ConfigError, ModelConfig
from lrt_jax.setup.errors import UserError

__all__ = ["export_weights", "from_reference", "import_weights", "to_reference", "verify"]

# What a safetensors file of ours keeps beside the arrays.
CONFIG_KEY, TOKENIZER_KEY = "lrt_jax.config", "lrt_jax.tokenizer"
# An imported run's batch, until its config says otherwise.
BATCH_SIZE = 32
# Model fields that change speed, not numbers.
SPEED_ONLY = ("dtype", "attention", "scan_layers", "remat")


def define_flags() -> None:
    """Declares the command's flags."""
    config_flags.DEFINE_config_file("config", None, "import: the run's config; its model must be the file's.")
    flags.DEFINE_string("out", None, "import: the new work dir; export: the new .safetensors file.")
    flags.DEFINE_string(
        "reference_config", None, "import: the authors' config fields as JSON, where the file does not hold them."
    )
    flags.DEFINE_string("tokenizer", None, "import: the SentencePiece model that the weights were trained on.")
    flags.DEFINE_integer("step", None, "export: the checkpoint's step; default: the newest.", lower_bound=0)
    flags.DEFINE_enum("names", "lrt_jax", ["lrt_jax", "reference"], "export: whose names and layout.")
    flags.DEFINE_enum("precision", "float64", ["float64", "float32"], "verify: what to compute in.")
    flags.DEFINE_float(
        "tolerance",
        None,
        "verify: largest error, as a share of an array's largest entry; default: 1e-6, in float32 1e-5.",
    )


def main(*arguments: str) -> int | None:
    """Runs the action that the arguments name."""
    given = flags.FLAGS
    if len(arguments) != 2 or arguments[0] not in ("import", "export", "verify"):
        found = " ".join(arguments) or "nothing"
        raise ConfigError(f"the arguments are {found!r}; allowed are: import FILE, export DIR, verify FILE")
    action, kind = arguments[0], "folder" if arguments[0] == "export" else "file"
    path = workdirs.local(arguments[1], f"the argument of {action}", kind)
    if action == "verify":
        return verify(path, given.precision, given.tolerance)
    if not given.out:
        raise ConfigError("--out is not set; it must be the work dir, or the .safetensors file, to make")
    out = workdirs.local(given.out, "--out", "file" if action == "export" else "folder")
    if action == "export":
        export_weights(path, out, given.step, given.names)
    else:
        import_weights(path, out, given.config, given.reference_config, given.tokenizer)
    return None


def import_weights(
    path: Path,
    workdir: Path,
    config: ConfigDict | None = None,
    reference_config: str | None = None,
    tokenizer: str | None = None,
) -> None:
    """Makes a work dir of a file of weights, in the authors' names or ours.

    Args:
      path: of the file.
      workdir: to make.
      config: of the run; its model must be the file's, where the file says which that is.
      reference_config: a JSON file with the authors' config fields.
      tokenizer: a file with a SentencePiece model.

    Raises:
      UserError: the file, the config or the tokenizer does not fit, or the work dir is not empty.
    """
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise ConfigError(f"--out is {str(workdir)!r}, which is there already; import into a new folder")
    file = files.read(path)
    run, params = _config_and_params(
        file, path, None if config is None else configs.from_config_dict(config), reference_config
    )
    found = _tokenizer(file, path, run, tokenizer, config is not None)
    wide = {name: array for name, array in params.items() if array.dtype == np.float64}
    inexact = [name for name, array in wide.items() if np.any(array.astype(np.float32) != array)]
    if found is not None:
        tokenizers.keep(found, workdir)
    binding.write_config(run, workdir)
    checkpoints = checkpoint.Checkpoints(workdir)
    checkpoints.save_params({name: jnp.asarray(array, jnp.float32) for name, array in params.items()}, run)
    checkpoints.wait()
    checkpoints.close()
    print(f"{workdir}: parameters of {path}\n{costs.count_parameters(run.model)}")
    print("model: " + ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(run.model).items()))
    if inexact:
        print(f"rounded from float64 to float32: {', '.join(inexact)}")
    if found is None:
        print("no tokenizer came with them, and text needs one; import with --tokenizer=FILE")


def _config_and_params(
    file: files.ArrayFile, path: Path, given: Config | None, reference_path: str | None
) -> tuple[Config, dict[str, np.ndarray]]:
    """The run's config, and its parameters by our names."""
    stated = _stated_config(file, path, reference_path)
    config = given or stated
    if config is None:
        raise ConversionError(
            f"{path} does not say which model it holds; give --reference_config (the authors' fields) or --config"
        )
    if stated is not None:
        _check_same_model(path, stated.model, config.model)
    own = table(config.model)
    if file.parameters.keys() & own.keys():
        files.check_shapes(file.parameters, {name: [parameter.shape] for name, parameter in own.items()})
        return config, {name: files.widened(name, array) for name, array in file.parameters.items()}
    return config, from_reference(file.parameters, config.model)


def _stated_config(file: files.ArrayFile, path: Path, reference_path: str | None) -> Config | None:
    """The config that the file, or the authors' fields beside it, describes; None if there is neither."""
    if CONFIG_KEY in file.metadata:
        with _naming(path):
            return configs.from_json(file.metadata[CONFIG_KEY])
    fields = files.reference_config(file.metadata, path)
    if reference_path:
        place = workdirs.expanded(reference_path, "--reference_config")
        fields = files.parse_reference_config(_read(place, reference_path), place)
    if fields is None:
        return None
    fields = reference.complete_config(fields, file.parameters)
    train = configs.TrainConfig(batch_size=BATCH_SIZE, tokens_per_parameter=10.0)
    with _naming(Path(reference_path) if reference_path else path):
        model, schedule = reference.model_config(fields), reference.schedule_config(fields)
        return configs.validate(Config(model=model, train=train, schedule=schedule))


def _read(path: Path, reference_path: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        found = f"cannot be read ({error.strerror})"
    except UnicodeDecodeError:
        found = "is not UTF-8 text"
    raise ConfigError(f"--reference_config is {reference_path!r}, which {found}; it must be a JSON file")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Within, what does not fit in a file's config names the file, too.

    Raises:
      ConversionError: it does not fit.
    """
    try:
        yield
    except UserError as error:
        raise ConversionError(f"the config in {path} does not fit: {error}") from None


def _check_same_model(path: Path, stated: ModelConfig, given: ModelConfig) -> None:
    different = [
        f"{field.name} {getattr(given, field.name)!r} instead of {getattr(stated, field.name)!r}"
        for field in dataclasses.fields(ModelConfig)
        if field.name not in SPEED_ONLY and getattr(given, field.name) != getattr(stated, field.name)
    ]
    if different:
        raise ConversionError(f"the model of --config is not that of {path}: {', '.join(different)}")


def _tokenizer(
    file: files.ArrayFile, path: Path, config: Config, given: str | None, configured: bool
) -> tokenizers.Tokenizer | None:
    """The tokenizer given by flag, by the user's config, or with the weights."""
    source = given
    if not source and (configured or TOKENIZER_KEY not in file.metadata):  # else a path of who exported them
        source = config.data.tokenizer
    if source:
        data = dataclasses.replace(config.data, tokenizer=source)
        return tokenizers.given(dataclasses.replace(config, data=data))
    if TOKENIZER_KEY in file.metadata:
        try:
            model = base64.b64decode(file.metadata[TOKENIZER_KEY], validate=True)
        except ValueError as error:
            raise ConversionError(f"the tokenizer in {path} is damaged ({error}); give one by --tokenizer") from None
        return tokenizers.checked(model, f"in {path}", config)
    return None


def export_weights(workdir: Path, out: Path, step: int | None = None, names: str = "lrt_jax") -> None:
    """Writes the parameters of a checkpoint (None: the newest) to a new safetensors file for :func:`import_weights`.

    In our names, "lrt_jax", with the config and the tokenizer; or "reference", with the authors' config fields.

    Raises:
      UserError: there is no such checkpoint, the file is there already, or the reference has no such model.
    """
    if not (workdir / binding.CONFIG_FILE).exists():
        raise ConfigError(f"{str(workdir)!r} has no {binding.CONFIG_FILE}; export takes a run's work dir")
    config, params, step = load.load_params(workdir, step)
    arrays = {name: np.asarray(array) for name, array in params.items()}
    metadata: dict[str, Any] = {"format": "np", "step": str(step)}
    if names == "reference":
        arrays = to_reference(arrays, config.model)
        fields = reference.reference_config(config.model, config.schedule.in_stages[-1].schedule)
        metadata["config_json"] = json.dumps(fields)
    else:
        metadata[CONFIG_KEY] = config.to_json()
    kept = workdir / tokenizers.FILE
    binding.check_kept_tokenizer(workdir, step)
    if kept.exists():
        metadata[TOKENIZER_KEY] = base64.b64encode(tokenizers.bytes_kept(workdir)).decode()
    files.write_safetensors(out, arrays, metadata)
    print(f"{out}: {len(arrays)} arrays of {workdir} at step {step:,}, {names} names")


def verify(path: Path, precision: str = "float64", tolerance: float | None = None) -> int:
    """Compares everything that a parity file holds with our numbers; 1 where one is past the tolerance.

    Raises:
      UserError: the file is broken, or the tolerance is no finite number from 0 up.
    """
    precise = precision == "float64"
    tolerance = (1e-6 if precise else 1e-5) if tolerance is None else tolerance
    if not 0 <= tolerance < math.inf:
        raise ConfigError(f"--tolerance is {tolerance}; it must be a finite number, 0 or more")
    errors = []
    with jax.enable_x64(precise):
        for name, error in parity.differences(path, "float64" if precise else "float32"):
            print(f"{error:10.2e}  {'' if error <= tolerance else 'FAILED  '}{name}", flush=True)
            errors.append(error)
    failed = sum(not error <= tolerance for error in errors)  # NaN is past any tolerance
    verdict = f"{failed} past" if failed else "all within"
    print(f"{path}: {len(errors)} arrays in {precision}, largest error {np.max(errors):.2e}, {verdict} {tolerance:g}")
    return 1 if failed else 0


if __name__ == "__main__":
    define_flags()
    command_line.run(main, takes_arguments=True)
