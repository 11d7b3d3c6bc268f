"""Import, export and verify weights.

python -m lrt_jax.convert import FILE --out=DIR [--reference_config=FILE] [--config=FILE] [--tokenizer=FILE]
python -m lrt_jax.convert export DIR --out=FILE.safetensors [--step=N] [--names=lrt_jax|reference]
python -m lrt_jax.convert verify FILE.npz [--precision=float64|float32] [--tolerance=X]
"""

import base64
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags

from lrt_jax.conversion import files, parity
from lrt_jax.conversion.reference import ConversionError, from_reference, model_config, schedule_config, to_reference
from lrt_jax.data import tokenizer as tokenizers
from lrt_jax.inference import load
from lrt_jax.model import costs
from lrt_jax.model.parameters import table
from lrt_jax.setup import config as configs
from lrt_jax.setup import flags as command_line
from lrt_jax.setup.config import Config, ConfigError, ModelConfig
from lrt_jax.training import checkpoint

__all__ = ["from_reference", "to_reference"]

CONFIG = config_flags.DEFINE_config_file("config", None, "import: the run's config; its model must fit the weights.")
OUT = flags.DEFINE_string("out", None, "import: the new work dir; export: the new .safetensors file.")
REFERENCE_CONFIG = flags.DEFINE_string(
    "reference_config", None, "import: the authors' config fields as JSON, where the file does not hold them."
)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "import: the SentencePiece model that the weights were trained on.")
STEP = flags.DEFINE_integer("step", None, "export: the checkpoint's step; default: the newest.", lower_bound=0)
NAMES = flags.DEFINE_enum("names", "lrt_jax", ["lrt_jax", "reference"], "export: whose names and layout.")
PRECISION = flags.DEFINE_enum("precision", "float64", ["float64", "float32"], "verify: what to compute in.")
TOLERANCE = flags.DEFINE_float(
    "tolerance", None, "verify: largest error, as a share of an array's largest entry; default: 1e-6, in float32 1e-5."
)

# What a safetensors file of ours keeps beside the arrays.
CONFIG_KEY, TOKENIZER_KEY = "lrt_jax.config", "lrt_jax.tokenizer"
# An imported run's batch, until its config says otherwise.
BATCH_SIZE = 32


def main(*arguments: str) -> int | None:
    """Runs the action that the arguments name."""
    actions = {"import": import_weights, "export": export_weights, "verify": verify}
    if len(arguments) != 2 or arguments[0] not in actions:
        found = " ".join(arguments) or "nothing"
        raise ConfigError(f"the arguments are {found!r}; allowed are: import FILE, export DIR, verify FILE")
    return actions[arguments[0]](Path(arguments[1]))


def import_weights(path: Path) -> None:
    """Makes a work dir of a file of weights, in the authors' names or ours.

    Raises:
      UserError: the file, the config or the tokenizer does not fit, or the work dir is not empty.
    """
    if not OUT.value:
        raise ConfigError("--out is not set; it must be the work dir to make")
    workdir = Path(OUT.value)
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise ConfigError(f"--out is {OUT.value!r}, which is there already; import into a new folder")
    file = files.read(path)
    config, params = _config_and_params(file, path)
    tokenizer = _tokenizer(file, config)
    if tokenizer is not None:
        tokenizers.keep(tokenizer, workdir)
    checkpoint.write_config(config, workdir)
    checkpoints = checkpoint.Checkpoints(workdir)
    checkpoints.save_params({name: jnp.asarray(array, jnp.float32) for name, array in params.items()}, config)
    checkpoints.close()
    print(f"{workdir}: parameters of {path}\n{costs.count_parameters(config.model)}")
    print("model: " + ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(config.model).items()))
    if tokenizer is None:
        print(
            "no tokenizer came with them: lrt_jax.evaluate and lrt_jax.generate need one; import with --tokenizer=FILE"
        )


def _config_and_params(file: files.ArrayFile, path: Path) -> tuple[Config, dict[str, np.ndarray]]:
    given = None if CONFIG.value is None else configs.from_config_dict(CONFIG.value)
    if CONFIG_KEY in file.metadata:
        config = given or configs.from_json(file.metadata[CONFIG_KEY])
        _check_own(file.arrays, config.model)
        return config, file.arrays
    fields = files.reference_config(file.metadata, path)
    if REFERENCE_CONFIG.value:
        fields_path = Path(REFERENCE_CONFIG.value)
        if not fields_path.is_file():
            raise ConfigError(f"--reference_config is {REFERENCE_CONFIG.value!r}, where there is no file")
        fields = files.parse_reference_config(fields_path.read_text(), fields_path)
    if given is None and fields is None:
        raise ConversionError(
            f"{path} does not say which model it holds; give --reference_config (the authors' fields) or --config"
        )
    config = given or _default_config(fields or {})
    return config, from_reference(file.parameters, config.model)


def _default_config(fields: dict[str, Any]) -> Config:
    """A run with the model and schedule of the authors' fields, and our defaults for the rest."""
    model, schedule = model_config(fields), schedule_config(fields)
    train = configs.TrainConfig(batch_size=BATCH_SIZE, tokens_per_parameter=10.0)
    return configs.validate(Config(model=model, train=train, schedule=schedule))


def _check_own(arrays: dict[str, np.ndarray], config: ModelConfig) -> None:
    expected = {name: parameter.shape for name, parameter in table(config).items()}
    faults = [f"{name} misses" for name in expected if name not in arrays]
    faults += [f"{name} is surplus" for name in sorted(arrays.keys() - expected.keys())]
    faults += [
        f"{name} has shape {arrays[name].shape} instead of {shape}"
        for name, shape in expected.items()
        if name in arrays and arrays[name].shape != shape
    ]
    if faults:
        raise ConversionError(f"the arrays do not fit the model config: {'; '.join(faults)}")


def _tokenizer(file: files.ArrayFile, config: Config) -> tokenizers.Tokenizer | None:
    """The tokenizer given by flag, by config, or with the weights."""
    source = TOKENIZER.value or config.data.tokenizer
    if source:
        data = dataclasses.replace(config.data, tokenizer=source)
        return tokenizers.given(dataclasses.replace(config, data=data))
    if TOKENIZER_KEY in file.metadata:
        return tokenizers.Tokenizer(base64.b64decode(file.metadata[TOKENIZER_KEY]))
    return None


def export_weights(workdir: Path) -> None:
    """Writes a checkpoint's parameters, with the config and the tokenizer, to one safetensors file.

    Raises:
      UserError: there is no such checkpoint, the file is there already, or the reference has no such model.
    """
    if not OUT.value:
        raise ConfigError("--out is not set; it must be the .safetensors file to write")
    config, params, step = load.load_params(workdir, STEP.value)
    arrays = {name: np.asarray(array) for name, array in params.items()}
    metadata = {"format": "np", "step": str(step)}
    if NAMES.value == "reference":
        arrays = to_reference(arrays, config.model)
    else:
        metadata[CONFIG_KEY] = config.to_json()
        kept = workdir / tokenizers.FILE
        if kept.exists():
            metadata[TOKENIZER_KEY] = base64.b64encode(kept.read_bytes()).decode()
    files.write_safetensors(Path(OUT.value), arrays, metadata)
    print(f"{OUT.value}: {len(arrays)} arrays of {workdir} at step {step:,}, {NAMES.value} names")


def verify(path: Path) -> int:
    """Compares everything that a parity file holds with our numbers; 1 where one is past the tolerance."""
    precise = PRECISION.value == "float64"
    jax.config.update("jax_enable_x64", precise)
    tolerance = (1e-6 if precise else 1e-5) if TOLERANCE.value is None else TOLERANCE.value
    worst, failed, count = 0.0, 0, 0
    for name, error in parity.differences(path, "float64" if precise else "float32"):
        fits = error <= tolerance  # false for NaN
        print(f"{error:10.2e}  {'' if fits else 'FAILED  '}{name}", flush=True)
        worst, failed, count = max(worst, error), failed + (not fits), count + 1
    verdict = f"{failed} past" if failed else "all within"
    print(
        f"{path}: {count} arrays in {PRECISION.value}, largest error {worst:.2e}, {verdict} the tolerance {tolerance:g}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    command_line.run(main, takes_arguments=True)
