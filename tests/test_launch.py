"""Launch scripts: a dry run prints what a shell, sbatch or Kubernetes would run, whatever the arguments hold."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted(LAUNCH.rglob("*.sh"))
# Spaces, both quotes, dollars, backslashes, globs, line ends, and what the scripts themselves put in place.
TRAINING = [
    "--config=configs/base.py:debug",
    "--workdir=/mnt/lrt/runs/my run",
    '--config.eval.prompt=it\'s "$HOME" $(date) `id` \\n * ; | & @NAME@ # if spot',
    "--config.data.corpus=/data/*.jsonl",
    "--config.schedule.stages=plain:0.8, interleaved(2):0.2",
    "two\nlines\tand a tab",
]


# To a JobSet, and to the loop of tpu_vm.sh, 0 means complete.
STOPPED = "--stopped_exit_code=75"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([str(LAUNCH / script), *arguments], capture_output=True, text=True, cwd="/")


def dry(script: str, *arguments: str) -> str:
    done = run(script, "--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_by_bash(line: str) -> list[str]:
    """The words that bash makes of a line of shell."""
    program = f'set -f; show() {{ printf "%s\\0" "$@"; }}; show {line}'
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def training_of(shell: str) -> list[str]:
    """What follows ``-m lrt_jax.main`` in a line of shell, read by bash."""
    return read_by_bash(shell.split("-m lrt_jax.main", 1)[1])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(LAUNCH)))
def test_shellcheck_has_nothing_to_say(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([str(shellcheck), str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert script.stat().st_mode & 0o111


def test_all_scripts_are_tested_here():
    assert [str(path.relative_to(LAUNCH)) for path in SCRIPTS] == ["gke/run.sh", "local.sh", "slurm.sh", "tpu_vm.sh"]


def test_local():
    words = read_by_bash(dry("local.sh", *TRAINING))
    assert words == [".venv/bin/python", "-m", "lrt_jax.main", *TRAINING]
    assert "--config=configs/base.py" in read_by_bash(dry("local.sh", "--workdir=x --config=y"))


TPU = ["my-run", "--zone=us-west4-a", "--project=p", "--type=v5litepod-256"]


def commands_of(out: str) -> list[list[str]]:
    return [read_by_bash(line) for line in re.split(r"\n(?=gcloud|git|#)", out.strip()) if not line.startswith("#")]


def test_tpu_vm_creates_runs_logs_and_deletes():
    (create,) = commands_of(dry("tpu_vm.sh", "create", *TPU, "--spot"))
    assert create == [
        *["gcloud", "compute", "tpus", "queued-resources", "create", "my-run", "--zone=us-west4-a", "--project=p"],
        *["--accelerator-type=v5litepod-256", "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=my-run", "--spot"],
    ]
    archive, copy, start = commands_of(dry("tpu_vm.sh", "run", *TPU, "--", *TRAINING))
    assert archive[:2] == ["git", "archive"]
    assert copy[3:7] == ["tpu-vm", "scp", "lrt-jax.tar.gz", "my-run:lrt-jax.tar.gz"] and "--worker=all" in copy
    assert start[3:6] == ["tpu-vm", "ssh", "my-run"] and "--worker=all" in start
    assert training_of(start[-1].partition(" >>$HOME/lrt-jax.log 2>&1; ")[0]) == [STOPPED, *TRAINING]
    (logs,) = commands_of(dry("tpu_vm.sh", "logs", *TPU))
    assert logs[3:6] == ["tpu-vm", "ssh", "my-run"] and logs[-1].startswith("--command=tail")
    (delete,) = commands_of(dry("tpu_vm.sh", "delete", *TPU))
    assert delete[3:6] == ["queued-resources", "delete", "my-run"] and "--force" in delete


def test_tpu_vm_slices_share_one_run_and_a_bucket():
    out = dry("tpu_vm.sh", "up", *TPU, "--slices=2", "--bucket=b", "--", *TRAINING)
    create, _, *others, delete = commands_of(out)
    assert "--node-count=2" in create and "--node-prefix=my-run" in create
    assert [words[5].partition(":")[0] for words in others[2:]] == ["my-run-0", "my-run-1"]
    assert all("gcsfuse --implicit-dirs --rename-dir-limit=200000 b /mnt/lrt" in words[-1] for words in others[2:])
    assert len({words[-1] for words in others[2:]}) == 1  # the same command everywhere
    assert delete[4] == "delete" and "preemption" in out
    assert "at most 5 times without" in out and "at most 0 times" in dry(
        "tpu_vm.sh", "up", *TPU, "--restarts=0", "--", "x"
    )


def test_tpu_vm_workers_say_how_they_ended(tmp_path):
    for name in ("8", "24", "100.deleted", "damaged"):
        (tmp_path / "my run" / "checkpoints" / name).mkdir(parents=True)
    for workdir, step in ((["--workdir=my run"], 24), (["--workdir", "my run"], 24), ([], 0)):
        *_, start = commands_of(dry("tpu_vm.sh", "run", *TPU, "--", *workdir, "--config=x"))
        ending = start[-1].partition(" >>$HOME/lrt-jax.log 2>&1; ")[2]
        done = subprocess.run(["bash", "-c", f"(exit 75); {ending}"], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 75 and done.stdout.splitlines()[-1] == f"lrt-jax ended: exit 75, step {step}"


# Commands of a worker: each says that it was called, in a file; those that make something make one like it.
WORKER = {
    "old_python": "exit 1",
    "python": 'case $2 in venv) mkdir -p $3/bin; cp "$0" $3/bin/python ;; lrt_jax.main) exit 75 ;; esac',
    "curl": 'case $* in *uv*) echo "mkdir -p ~/.local/bin; cp $TOOLS/uv ~/.local/bin" ;; *) echo key ;; esac',
    "uv": "mkdir -p .venv/bin; cp $TOOLS/python .venv/bin/python",
    "apt-get": "case $* in *install*gcsfuse*) cp $TOOLS/gcsfuse $IMAGE/gcsfuse ;; esac",
    "sudo": 'case $1 in mkdir | chown) ;; tee) cat >"$HOME/${2##*/}" ;; *) "$@" ;; esac',
    **dict.fromkeys(("tar", "gcsfuse", "sleep"), ""),
    "mountpoint": "exit 1",
}


@pytest.mark.parametrize(
    ("has", "brought"),
    [
        ({"python3": "python", "gcsfuse": "gcsfuse"}, []),
        ({"python3": "old_python", "python3.11": "python", "gcsfuse": "gcsfuse"}, []),
        ({"python3": "old_python", "uv": "uv", "gcsfuse": "gcsfuse"}, ["uv venv"]),
        ({"python3": "old_python"}, ["curl -fsSL", "apt-get -qq install", "curl -LsSf", "uv venv"]),
    ],
)
def test_tpu_vm_brings_what_an_image_lacks(tmp_path, has, brought):
    tools, image, home = (tmp_path / name for name in ("tools", "image", "home"))
    for folder in (tools, image, home):
        folder.mkdir()
    for name, program in WORKER.items():
        (tools / name).write_text(f'#!/bin/bash\necho "${{0##*/}} $*" >>$HOME/calls\n{program}\n')
        (tools / name).chmod(0o755)
    for name in ("bash", "sh", "mkdir", "rm", "cp", "cat", "ls", "sed", "grep", "sort", "tail"):
        (image / name).symlink_to(shutil.which(name))
    for name, tool in {
        **{name: name for name in ("tar", "curl", "apt-get", "sudo", "sleep", "mountpoint")},
        **has,
    }.items():
        shutil.copy(tools / tool, image / name)
    *_, start = commands_of(dry("tpu_vm.sh", "run", *TPU, "--bucket=b", "--", "--config=x"))
    command = start[-1].removeprefix("--command=").replace("/mnt/lrt", "mnt")
    assert "\n" not in command
    environment = {"HOME": str(home), "USER": "me", "PATH": str(image), "TOOLS": str(tools), "IMAGE": str(image)}

    def called(begins):
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=home, env=environment)
        assert done.returncode == 75 and "lrt-jax ended: exit 75" in done.stdout, done
        calls = (home / "calls").read_text()
        (home / "calls").unlink()
        install, train = [line for line in calls.splitlines() if line.startswith("python -m")][-2:]
        assert install.endswith("pip install --quiet -e .[gcs] jax[tpu]") and "lrt_jax.main" in train
        return [line for line in calls.splitlines() if line.startswith(begins)]

    begins = ("curl", "uv", "apt-get -qq -o", "apt-get -qq install")
    calls = called(begins)
    assert len(calls) == len(brought), calls
    for call, expected in zip(calls, brought, strict=True):
        assert call.replace("-o DPkg::Lock::Timeout=300 ", "").startswith(expected)
    assert not called(begins)  # it is there now
    if "gcsfuse" not in has:
        codename = re.search(r"^VERSION_CODENAME=(.*)$", Path("/etc/os-release").read_text(), flags=re.MULTILINE)
        assert (home / "gcsfuse.list").read_text() == (
            "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt "
            f"gcsfuse-{codename[1] if codename else ''} main\n"
        )


# Prints what workers said in the run of the day, and hands on no exit code.
GCLOUD = """#!/usr/bin/env bash
echo "$*" >>calls
case $* in
    *describe*) echo ACTIVE ;;
    *" ssh "*) head -n 1 days | tr ';' '\\n' && sed -i 1d days ;;
esac
"""


@pytest.mark.parametrize(
    ("days", "code", "pauses", "says"),
    [
        (["75 10;75 10", "134 10;75 10", "75 20;134 20", "0 30;0 30"], 0, ["10", "20", "10"], "step 20"),
        (["75 10"] * 9, 1, ["10", "20", "40"], "error: training stopped 3 times without a checkpoint after step 10"),
        (["75 10;1 10", "0 20"], 1, [], "error: training ended with an error"),
        (["", "0 20"], 1, [], "error: training ended with an error"),
    ],
)
def test_tpu_vm_runs_again_while_there_is_progress(tmp_path, days, code, pauses, says):
    for name, text in (("gcloud", GCLOUD), ("git", "#!/bin/sh\n"), ("sleep", '#!/bin/sh\necho "$1" >>pauses\n')):
        (tmp_path / name).write_text(text.replace(">>", f">>{tmp_path}/").replace(" days", f" {tmp_path}/days"))
        (tmp_path / name).chmod(0o755)
    said = [re.sub(r"(\d+) (\d+)", r"lrt-jax ended: exit \1, step \2", day) for day in days]
    (tmp_path / "days").write_text("\n".join(said) + "\n")
    arguments = ["up", *TPU, "--restarts=2", "--", *TRAINING]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [str(LAUNCH / "tpu_vm.sh"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == code and says in done.stderr, done
    assert (tmp_path / "pauses").read_text().split() == pauses if pauses else not (tmp_path / "pauses").exists()
    assert ("delete" in (tmp_path / "calls").read_text()) == (code == 0)  # machines of a run that failed are kept


@pytest.mark.parametrize("action", ["run", "up"])
def test_tpu_vm_ships_nothing_that_is_not_committed(tmp_path, action):
    (tmp_path / "launch").mkdir()
    shutil.copy(LAUNCH / "tpu_vm.sh", tmp_path / "launch")
    (tmp_path / "gcloud").write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/calls\n')
    (tmp_path / "gcloud").chmod(0o755)
    (tmp_path / ".gitignore").write_text("gcloud\ncalls\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run([*git, "init", "-q"], check=True)
    command = [str(tmp_path / "launch" / "tpu_vm.sh"), action, *TPU, "--", "x"]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=20)
    assert done.returncode == 2 and done.stderr.startswith("error: .gitignore is not committed"), done
    assert done.stderr.count("\n") == 1 and not (tmp_path / "calls").exists()  # nothing was asked for
    shown = subprocess.run([command[0], "--dry-run", *command[1:]], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("# would stop here: .gitignore is not committed")
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    shown = subprocess.run([command[0], "--dry-run", *command[1:]], capture_output=True, text=True, check=True).stdout
    assert "would stop" not in shown
    command[1] = "run"
    subprocess.run(command, capture_output=True, text=True, env=environment)
    assert " scp " in (tmp_path / "calls").read_text()


def test_what_reads_buckets_is_named():
    extras = tomllib.loads((LAUNCH.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["gcs"] == ["gcsfs"] and extras["s3"] == ["s3fs"]


def test_slurm():
    script = dry("slurm.sh", "--nodes=2", "--gpus=8", "--partition=a", "--", *TRAINING).partition("\n")[2]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    options = re.findall(r"^#SBATCH (.*)$", script, flags=re.MULTILINE)
    assert {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--requeue", "--partition=a"} <= set(options)
    assert "gpus-per-task" not in script
    (start,) = re.findall(r"^srun (.*?) &$", script, flags=re.MULTILINE | re.DOTALL)
    assert training_of(start) == TRAINING


GKE = ["--image=gcr.io/p/i:1", "--accelerator=tpu-v5-lite-podslice", "--topology=16x16", "--hosts=64"]


def test_gke():
    script = "gke/run.sh"
    manifest = dry(script, "my-run", *GKE, "--slices=2", "--spot", "--bucket=b", "--", *TRAINING)
    (command,) = re.findall(r"^ *command: (\[.*\])$", manifest, flags=re.MULTILINE)
    # Kubernetes takes $$( for $(, and what is no reference as it is.
    words = [word.replace("$$(", "$(") for word in json.loads(command)]
    assert words == ["python", "-m", "lrt_jax.main", STOPPED, *TRAINING]
    rest = manifest.replace(command, "")
    assert (
        "replicas: 2" in rest and "completions: 64" in rest and 'gke-spot: "true"' in rest and "bucketName: b" in rest
    )
    assert not re.search(r"@[A-Z]+@|# if", rest)
    plain = dry(script, "my-run", *GKE, "--", *TRAINING)
    assert "gke-spot" not in plain and "gcsfuse" not in plain


def test_gke_starts_again_except_after_an_error():
    jobset = yaml.safe_load(dry("gke/run.sh", "my-run", *GKE, "--bucket=b", "--", *TRAINING))["spec"]
    policy, (slices,) = jobset["failurePolicy"], jobset["replicatedJobs"]
    assert policy["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    preempted, failed = job["podFailurePolicy"]["rules"]  # the first that fits counts
    assert preempted == {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert failed["action"] == "FailJob" and failed["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [1],
    }
    assert pod["restartPolicy"] == "Never"  # what a podFailurePolicy needs
    assert job["backoffLimit"] == 0 and policy["maxRestarts"] > 0  # all other codes
    bucket = next(volume["csi"] for volume in pod["volumes"] if volume["name"] == "bucket")
    assert pod["hostNetwork"] and bucket["volumeAttributes"]["hostNetworkPodKSA"] == "true"


@pytest.mark.parametrize(
    ("script", "arguments"), [("local.sh", []), ("slurm.sh", ["--nodes=1", "--gpus=1", "--", "x"])]
)
def test_a_missing_environment_is_said_before_anything_starts(tmp_path, script, arguments):
    (tmp_path / "launch").mkdir()
    shutil.copy(LAUNCH / script, tmp_path / "launch")
    (tmp_path / "sbatch").write_text('#!/bin/sh\ncat >/dev/null; echo "Submitted"\n')
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [str(tmp_path / "launch" / script), *arguments]
    for name in ("sbatch", ".venv/bin/python"):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 2 and not done.stdout
        assert re.fullmatch("error: there is no .venv/bin/python in .*; make install .*\n", done.stderr), done
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        (tmp_path / name).chmod(0o755)
    if script == "slurm.sh":
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        assert done.stdout == "Submitted\n" and "warning: .venv has jax for CPUs only" in done.stderr
        (tmp_path / ".venv/lib/python3.12/site-packages/jax_cuda13_plugin").mkdir(parents=True)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        assert done.stdout == "Submitted\n" and not done.stderr


def test_gke_image_copies_what_there_is():
    for line in (LAUNCH / "gke" / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            assert all((LAUNCH.parent / name).exists() for name in line.split()[1:-1])


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("tpu_vm.sh", ["create", "my-run"], "error: --type is not set"),
        ("tpu_vm.sh", ["create", "my-run", "--type=v9-8"], "error: no runtime is known for --type=v9-8"),
        ("tpu_vm.sh", ["create", "My Run"], "error: the name is 'My Run'"),
        ("tpu_vm.sh", ["run", "my-run"], "error: what to train is not set"),
        ("tpu_vm.sh", ["run", "my-run", "--config=x"], "error: --config=x is not an option"),
        ("tpu_vm.sh", ["create", "my-run", "--slices=0"], "error: --slices is '0'"),
        ("tpu_vm.sh", ["up", "my-run", "--restarts=x"], "error: --restarts is 'x'"),
        ("slurm.sh", ["--nodes=2", "--", "--config=x"], "error: --gpus is ''"),
        ("slurm.sh", ["--nodes=2", "--gpus=8", "--partition=a b", "--", "x"], "error: '--partition=a b' cannot stand"),
        ("gke/run.sh", ["my-run", "--hosts=64", "--", "x"], "error: --image is ''"),
        ("gke/run.sh", ["my-run", "--hosts=64", "--image=a b", "--", "x"], "error: --image is 'a b'"),
    ],
)
def test_what_is_wrong_is_said(script, arguments, message):
    done = run(script, "--dry-run", *arguments)
    assert done.returncode == 2 and message in done.stderr and not done.stdout


def test_local_dry_run_reads_back_in_any_shell():
    assert shlex.split(dry("local.sh", *TRAINING)) == [".venv/bin/python", "-m", "lrt_jax.main", *TRAINING]


@pytest.mark.parametrize(
    ("said", "build"),
    [
        ("echo 580.65.06; echo 580.65.06", "cuda13"),
        ("echo 1000.1", "cuda13"),
        ("echo 575.57.08", "cuda12"),
        ("echo 'NVIDIA-SMI has failed because it could not reach the NVIDIA driver. Make sure it runs.'; exit 9", None),
        ("echo 'No devices were found'; exit 6", None),
    ],
)
def test_make_takes_the_cuda_build_that_the_driver_runs(tmp_path, said, build):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncase $* in *driver_version*) {said} ;; esac\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("ACCELERATOR", "MAKEFLAGS")}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    command = ["make", "-n", "-B", "-C", str(LAUNCH.parent), "train"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert re.findall(r"jax\[(cuda\d+)\]", done.stdout) == ([build] if build else [])
