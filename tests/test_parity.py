"""The authors' numbers: losses, source states, logits and all gradients (tests/golden, from their PyTorch code)."""

from pathlib import Path

import jax
import numpy as np
import pytest

from lrt_jax.conversion import parity
from lrt_jax.conversion.files import ConversionError

GOLDEN = Path(__file__).parent / "golden"
FILES = {"lrt_s2": 62, "lrt_s2_full_context": 62, "lrt_s4_refresh": 64, "plain_baseline": 34}


def check(name: str, dtype: str, tolerance: float, **model) -> None:
    found = list(parity.differences(GOLDEN / f"{name}.npz", dtype, **model))
    assert len(found) == FILES[name]
    worst = max(found, key=lambda difference: difference.error)
    assert all(difference.error <= tolerance for difference in found), worst


# Every file, and between them every kind of program; test_programs holds the kinds to each other.
PROGRAMS = {
    "lrt_s2": {"scan_layers": False, "remat": True},
    "lrt_s2_full_context": {"scan_layers": True, "remat": True},
    "lrt_s4_refresh": {"scan_layers": True},
    "plain_baseline": {"scan_layers": False},
}


@pytest.mark.parametrize("name", FILES)
def test_in_float64(name):
    with jax.enable_x64(True):
        check(name, "float64", 1e-6, **PROGRAMS[name])


@pytest.mark.parametrize("name", ["lrt_s2", "plain_baseline"])
def test_in_float32(name):
    check(name, "float32", 1e-5, scan_layers=True)


def altered(tmp_path: Path, name: str, **changes) -> Path:
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    for key, value in changes.items():
        arrays.pop(key) if value is None else arrays.__setitem__(key, value)
    np.savez(tmp_path / "altered.npz", **arrays)
    return tmp_path / "altered.npz"


def test_a_wrong_number_is_found(tmp_path):
    with np.load(GOLDEN / "plain_baseline.npz") as file:
        loss, weights = file["plain/loss"], file["param/resid_lambdas"]
    path = altered(tmp_path, "plain_baseline", **{"plain/loss": loss * (1 + 1e-4)})
    errors = {difference.name: difference.error for difference in parity.differences(path, "float32")}
    assert [name for name, error in errors.items() if error > 1e-5] == ["plain/loss"]
    np.testing.assert_allclose(errors["plain/loss"], 1e-4, rtol=0.05)
    path = altered(tmp_path, "plain_baseline", **{"param/resid_lambdas": weights + 0.01})
    assert max(difference.error for difference in parity.differences(path, "float32")) > 1e-3
    path = altered(tmp_path, "plain_baseline", **{"plain/loss": loss * np.nan})
    assert any(np.isnan(difference.error) for difference in parity.differences(path, "float32"))


def test_surplus_rows_of_a_gradient_are_not_overlooked(tmp_path):
    name = "plain/grad/transformer.h.0.attn.c_q.weight"
    with np.load(GOLDEN / "plain_baseline.npz") as file:
        longer = np.pad(file[name], ((0, 9), (0, 0)), constant_values=1e9)
    with pytest.raises(ConversionError, match=r"c_q\.weight in .* has shape \(33, 24\), where ours has \(24, 24\)"):
        list(parity.differences(altered(tmp_path, "plain_baseline", **{name: longer}), "float32"))


def test_shorter_rows_than_the_context_and_uneven_subsets(tmp_path):
    """Windows come from the config's context, whatever the rows' length."""
    with np.load(GOLDEN / "lrt_s2.npz") as file:
        text, tokens, targets = str(file["config_json"]), file["tokens"], file["targets"]
        logits = file["decode/zero_memory_logits"]
        others = {key: None for key in file.files if key.startswith(("interleaved/", "refine", "decode/", "init"))}
    # A row of 12 in a context of 24 sees what the first 12 positions of a row of 24 see.
    short = {"tokens": tokens[:, :12], "targets": targets[:, :12], "init_forward/logits": logits[:, :12]}
    (found,) = parity.differences(altered(tmp_path, "lrt_s2", **others | short), "float32", scan_layers=True)
    assert found.error < 1e-5
    uneven = {"config_json": np.array(text.replace('"interleaved_num_passes": 2', '"interleaved_num_passes": 5'))}
    with pytest.raises(ConversionError, match="interleaved_num_passes = 5, which does not divide T = 24"):
        list(parity.differences(altered(tmp_path, "lrt_s2", **uneven), "float32"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "without tokens"),
        ({"config_json": None}, "without config_json"),
        ({"config_json": np.array('{"n_layer": 4}')}, "without sequence_len, vocab_size, n_head"),
        ({"targets": np.full((2, 24), -1)}, "targets outside of 0 to 36"),
        ({"tokens": np.zeros(24, int)}, r"tokens \(24,\) and targets \(2, 24\)"),
        ({"param_names": np.array(["nobody"])}, "param_names without parameter: nobody"),
        ({"interleaved/loss": np.zeros(())}, "interleaved/loss, which this check does not know"),
        ({"config_json": np.array("[4]")}, "not a JSON object"),
        ({"plain/other": np.zeros(3)}, "plain/other, which this check does not know"),
        ({"plain/logits": np.zeros((2, 3))}, r"plain/logits in .* has shape \(2, 3\), where ours has \(2, 24, 37\)"),
        ({"param/new": np.zeros(2), "param_names": None}, "new is surplus"),
        ({"param/lm_head.weight": np.zeros((3, 3))}, r"lm_head.weight has shape \(3, 3\) instead of \(37, 24\)"),
    ],
)
def test_broken_files_are_explained(tmp_path, changes, message):
    with pytest.raises(ConversionError, match=message):
        list(parity.differences(altered(tmp_path, "plain_baseline", **changes), "float32"))
