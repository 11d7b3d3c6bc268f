"""Two processes of two virtual devices each, as on a pod: they train, score and save like one process of four."""

import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from lrt_jax.setup import processes

ROOT = Path(__file__).parents[1]
RUN = [
    "lrt_jax.main",
    "--config=configs/base.py:debug",
    "--config.train.steps=4",
    "--config.train.log_every=1",
    "--config.train.eval_every=4",
    "--config.train.save_every=0",
    "--config.optimizer.warmup=0.0",
    "--config.optimizer.warmdown=0.0",
    "--config.train.batch_size=4",
    "--config.model.width=16",
    "--config.model.sequence_length=16",
    "--config.model.vocab_size=300",
    "--config.model.scan_layers=True",
    "--config.eval.batch_size=4",
    "--config.eval.rows=6",
    "--config.eval.final_rows=6",
    "--config.eval.sample_tokens=0",
    "--config.mesh.fsdp=2",
    "--config.data.held_out=0.3",
    "--config.data.document_bytes=400",
]
# What Gloo says of up to four ranks, in pieces: its threads write between each other.
GLOO = re.compile(r"\[Gloo\] Rank|is connected to|Expected number of connected peer ranks is :|peer ranks\.|[0-3]|\s")
# What the helpers do in two processes, and batches on a mesh whose rows both processes hold.
PROGRAM = """
import sys
import jax, numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), heartbeat_timeout_seconds=10)
from lrt_jax.setup import mesh as meshes, processes
from lrt_jax.setup.config import MeshConfig
from lrt_jax.setup.errors import UserError
first = processes.is_first()
assert processes.from_first(lambda: b"made" + bytes([255, 0]) if first else 1 / 0) == b"made" + bytes([255, 0])
assert processes.from_first(lambda: b"") == b""
def fail():
    raise UserError("no")
for failing in (0, 1):
    try:
        processes.together(fail if jax.process_index() == failing else lambda: 1)
    except UserError as error:
        assert str(error) == ("no" if jax.process_index() == failing else
                              f"process {failing} could not go on; its output says why"), error
    else:
        raise AssertionError
for sizes, expected in (((4, 1, 1, 1), (4, 4)), ((2, 1, 2, 1), (4, 4)), ((1, 1, 1, 4), (8, 8)), ((1, 2, 2, 1), (4, 4))):
    mesh = meshes.make_mesh(MeshConfig(*sizes))
    whole = np.arange(32, dtype=np.int32).reshape(8, 4)
    here = meshes.local_rows(mesh, 8)
    assert len(here) == expected[jax.process_index()], (sizes, here)
    batch = meshes.global_batch(mesh, whole[list(here)], 8)
    total = jax.jit(lambda x: (x * jax.numpy.arange(32).reshape(8, 4)).sum(), out_shardings=meshes.replicated(mesh))
    assert int(total(batch)) == (whole * whole).sum()
processes.wait("the end")
processes.say("said once")

# Runs that end before they begin: in both processes with the same sentence.
import dataclasses, pathlib
from lrt_jax import main
from lrt_jax.setup import workdir as workdirs
from lrt_jax.setup.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
place, index = pathlib.Path(sys.argv[3]), jax.process_index()
config = Config(ModelConfig(2, 16, 4, 2, 8, 40), TrainConfig(batch_size=4, steps=1), DataConfig(corpus="/nowhere"))
rate = OptimizerConfig(muon_lr=0.1 * (1 + index))
workdirs.PATIENCE = 0.3
said = open(place / f"said.{index}", "w")
for given, folder in (
    (dataclasses.replace(config, seed=index), "one"),
    (dataclasses.replace(config, seed=index, optimizer=rate), "one"),
    (config, f"of {index}"),
    (config, "one"),
):
    try:
        main.run(given, place / folder)
    except UserError as error:
        print(error, file=said)
    else:
        raise AssertionError
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def together(*commands: list[str], devices: int) -> list[str]:
    """Runs commands at once on virtual devices, and returns what each printed."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    running = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    ended = [process.communicate(timeout=300) for process in running]
    for process, (out, err) in zip(running, ended, strict=True):
        assert process.returncode == 0, out + err
    return [out for out, _ in ended]


def on_two(*arguments: str) -> list[str]:
    """A command of the package on two processes of two devices."""
    meeting = [f"--coordinator_address=localhost:{free_port()}", "--num_processes=2"]
    return together(*(["-m", *arguments, *meeting, f"--process_id={process}"] for process in range(2)), devices=2)


def metrics_of(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses_of(workdir: Path) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in metrics_of(workdir) if "train/loss" in row}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("corpus")
    words = np.random.default_rng(0).choice([f"word{i}" for i in range(50)], size=(40, 60))
    for index, row in enumerate(words):
        (folder / f"{index:03}.txt").write_text("\n".join(" ".join(line) for line in row.reshape(-1, 10)) + "\n")
    return f"--config.data.corpus={folder}"


def test_two_processes_of_two_devices_equal_one_of_four(corpus, tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    first, second = on_two(*RUN, corpus, f"--workdir={two}")
    assert "val/bpb_sequential" in first
    assert not GLOO.sub("", second)  # the first alone speaks
    together(["-m", *RUN, corpus, f"--workdir={one}", "--config.train.steps=6"], devices=4)
    losses, expected = losses_of(two), losses_of(one)
    assert sorted(losses) == [1, 2, 3, 4] and losses[4] != losses[1]
    np.testing.assert_allclose([losses[step] for step in losses], [expected[step] for step in losses], rtol=1e-5)
    (score,), (expected_score, _) = ([row for row in metrics_of(dir) if "val/bpb" in row] for dir in (two, one))
    for name in ("val/bpb", "val/bpb_init", "val/bpb_sequential"):
        assert score[name] == pytest.approx(expected_score[name], rel=1e-5)
    assert len(list(two.glob("events.out.tfevents.*"))) == 1

    # Two processes score and sample what they have saved.
    scores, silence = on_two("lrt_jax.evaluate", f"--workdir={two}")
    begin, end = scores.index("{"), scores.rindex("}") + 1
    assert not GLOO.sub("", scores[:begin] + scores[end:])
    scores = json.loads(scores[begin:end])
    assert scores["val/bpb_sequential"] == pytest.approx(score["val/bpb_sequential"], rel=1e-6)
    assert "val/" not in silence
    tasks = tmp_path / "tasks" / "commonsense_reasoning"
    tasks.mkdir(parents=True)
    items = [{"query": f"a{letter}", "choices": ["yes", "no"], "gold": 0} for letter in "bcd"]
    (tasks / "copa.jsonl").write_text("\n".join(map(json.dumps, items)))
    asked = on_two("lrt_jax.evaluate", f"--workdir={two}", f"--core={tasks.parent}", "--tasks=copa")
    assert "| copa | 3 | 0 |" in asked[0] and "copa" not in asked[1]
    evaluated = [sys.executable, "-m", "lrt_jax.evaluate", f"--workdir={two}", f"--core={tasks.parent}", "--tasks=copa"]
    (kept,) = (two / "few_shot").iterdir()
    kept.rename(tmp_path / "scored_by_two")
    subprocess.run(evaluated, check=True, capture_output=True, cwd=ROOT, env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"})
    of_two, of_one = (
        [json.loads(line) for line in next(folder.glob("copa-*.jsonl")).read_text().splitlines()[1:]]
        for folder in (tmp_path / "scored_by_two", kept)
    )
    assert [one["item"] for one in of_two] == [one["item"] for one in of_one] == [0, 1, 2]
    for one, other in zip(of_two, of_one, strict=True):
        np.testing.assert_allclose(one["losses"], other["losses"], rtol=1e-5)
    sampled = on_two("lrt_jax.generate", f"--workdir={two}", "--prompt=word", "--tokens=4")
    assert "word" in sampled[0] and "word" not in sampled[1]

    # One process goes on from where two stopped, with the same rows.
    together(["-m", *RUN, corpus, f"--workdir={two}", "--config.train.steps=6"], devices=4)
    losses = losses_of(two)
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose([losses[step] for step in (5, 6)], [expected[step] for step in (5, 6)], rtol=1e-5)


def test_helpers_in_two_processes_and_runs_that_were_not_given_the_same(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    where = f"localhost:{free_port()}"
    commands = ([str(tmp_path / "program.py"), where, str(process), str(tmp_path)] for process in range(2))
    assert ["said once" in out for out in together(*commands, devices=2)] == [True, False]
    for process in range(2):
        seed, two, folder, corpus = (tmp_path / f"said.{process}").read_text().splitlines()
        assert seed == "process 1 has config.seed 1, process 0 has 0; all processes must be given the same"
        assert two == (
            "process 1 has config.optimizer.muon_lr 0.2, process 0 has 0.1 (1 more field differs); all processes must "
            "be given the same"
        )
        assert folder.startswith(
            f"--workdir is not the same folder on process 1 ({tmp_path}/of 1) as on process 0 ({tmp_path}/of 0); all"
        )
        assert "/nowhere" in corpus  # the same, and so the next thing that is wrong is told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["program.py", "said.0", "said.1"]


def test_alone_nothing_is_exchanged():
    assert processes.from_first(lambda: b"made") == b"made"
    assert processes.together(lambda: 3) == 3
    processes.wait("nowhere")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("localhost:1", None, None), "--num_processes and --process_id must be set too"),
        ((None, 2, 0), "--coordinator_address must be set too"),
        (("localhost", 2, 0), "--coordinator_address is 'localhost'; it must be HOST:PORT"),
        (("localhost:99999", 2, 0), "--coordinator_address is 'localhost:99999'; it must be HOST:PORT"),
        (("localhost:1", 0, 0), "--num_processes is 0; it must be above 0"),
        (("localhost:1", 2, 2), "--process_id is 2; with --num_processes=2 allowed are 0 to 1"),
    ],
)
def test_flags_that_do_not_fit_are_said(flags, message):
    with pytest.raises(processes.ProcessError, match=message):
        processes.check_flags(*flags)


SRUN = dict.fromkeys(processes.SLURM, "0") | {"SLURM_STEP_NODELIST": "node[1-2]"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        (SRUN | {"SLURM_NTASKS": "8"}, True),
        (SRUN | {"SLURM_NTASKS": "1"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, False),  # no srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_the_environment_asks_for_several_processes_or_not(environment, expected):
    assert processes.asked_for(environment) == expected


@pytest.mark.parametrize(
    ("workers", "tpu_env", "expected"),
    [
        ("1:2:10.0.0.1", "ZONE: 'x'\n", False),
        ("1:2:10.0.0.1,1:2:10.0.0.2", "ZONE: 'x'\n", True),
        ("10.0.0.1", "MEGASCALE_NUM_SLICES: '2'\n", True),
        (None, None, False),
    ],
)
def test_a_tpu_vm_is_asked_by_its_metadata(workers, tpu_env, expected, monkeypatch):
    answers = {"worker-network-endpoints": workers, "tpu-env": tpu_env}

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer = answers[self.path.rpartition("/")[2]]
            self.send_response(404 if answer is None or self.headers["Metadata-Flavor"] != "Google" else 200)
            self.end_headers()
            self.wfile.write((answer or "").encode())

        def log_message(self, *_):
            pass

    monkeypatch.setattr(processes, "_on_tpu_vm", lambda _: True)
    with http.server.ThreadingHTTPServer(("localhost", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {"GCE_METADATA_IP": f"localhost:{server.server_port}"}
        assert processes.asked_for(environment) == expected
        server.shutdown()
