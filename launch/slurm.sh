#!/usr/bin/env bash
# Train on the GPUs of a SLURM cluster, one task for each GPU:
#   launch/slurm.sh [--dry-run] --nodes=N --gpus=PER_NODE [--time=HH:MM:SS] [--partition=…] [--account=…] [--name=…]
#                   [-- --config=… --workdir=… …]
# Run in the repository, on a file system that all nodes share, in the environment of `make install`; on a login node,
# which has no GPU to choose by, name the build: `make install ACCELERATOR=cuda13` (or cuda12). A job that is
# preempted or runs out of time gets SIGTERM two minutes before, saves, and is queued again; the same command goes on.
# Each task sees all GPUs of its node and takes the one of its local number: with --gpus-per-task a task would see only
# its own, and GPUs of one node could not reach each other directly.
# --dry-run prints the batch script that would be submitted, and submits nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

dry=
if [[ ${1:-} == --dry-run ]]; then
    dry=1
    shift
fi
nodes="" gpus="" time=24:00:00 name=lrt-jax options=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --nodes=*) nodes=${1#*=} ;;
        --gpus=*) gpus=${1#*=} ;;
        --time=*) time=${1#*=} ;;
        --name=*) name=${1#*=} ;;
        --partition=* | --account=* | --qos=* | --constraint=*) options+=("$1") ;;
        --)
            shift
            break
            ;;
        *)
            echo "error: $1 is not an option of launch/slurm.sh; those of training come after --" >&2
            exit 2
            ;;
    esac
    shift
done
for pair in "nodes=$nodes" "gpus=$gpus"; do
    [[ ${pair#*=} =~ ^[1-9][0-9]*$ ]] || {
        echo "error: --${pair%%=*} is '${pair#*=}'; it must be a number above 0" >&2
        exit 2
    }
done
[[ $# -gt 0 ]] || {
    echo "error: what to train is not set; for example: -- --config=configs/nanochat.py:depth=20 --workdir=runs/d20" >&2
    exit 2
}
for value in "$name" "$time" "${options[@]}"; do
    [[ $value =~ ^[-A-Za-z0-9_.,:=\&\|]+$ ]] || {
        echo "error: '$value' cannot stand in a line for sbatch; use letters, digits and -_.,:=" >&2
        exit 2
    }
done

script() {
    echo '#!/usr/bin/env bash'
    printf '#SBATCH %s\n' "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus" \
        "--time=$time" --exclusive --requeue --open-mode=append --signal=B:TERM@120 "--output=$name-%j.log" "${options[@]}"
    cat <<'SCRIPT'
set -euo pipefail
# The batch shell gets the signal: it passes it on to the tasks, which save and end, and asks for another turn.
trap 'stopped=1; kill -TERM "$training"' TERM
stopped=
SCRIPT
    printf 'cd %q\n' "$PWD"
    printf 'srun --kill-on-bad-exit=1 .venv/bin/python -m lrt_jax.main%s &\n' "$(printf ' %q' "$@")"
    cat <<'SCRIPT'
training=$!
wait "$training" || status=$?
if [[ -n $stopped ]]; then # that was the signal, not the end
    status=0
    wait "$training" || status=$?
fi
if [[ -n $stopped || ${status:-0} -eq 75 ]]; then # 75: the watchdog's, or another process was lost
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "${status:-0}"
SCRIPT
}

if [[ -n $dry ]]; then
    echo "# sbatch, with this on its standard input:"
    script "$@"
else
    [[ -x .venv/bin/python ]] || {
        echo "error: there is no .venv/bin/python in $PWD; make install ACCELERATOR=cuda13 (or cuda12) sets it up" >&2
        exit 2
    }
    if ! compgen -G '.venv/lib/python3*/site-packages/jax_*_plugin' >/dev/null; then
        echo "warning: .venv has jax for CPUs only; make --always-make install ACCELERATOR=cuda13 (or cuda12) brings the other" >&2
    fi
    script "$@" | sbatch
fi
