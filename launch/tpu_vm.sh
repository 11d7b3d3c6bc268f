#!/usr/bin/env bash
# Train on TPU VMs of Google Cloud, one slice or several, through a queued resource:
#   launch/tpu_vm.sh [--dry-run] ACTION NAME [--zone=…] [--project=…] [--type=v5litepod-256] [--version=…] [--slices=N]
#                    [--spot] [--bucket=BUCKET] [--restarts=N] [-- --config=… --workdir=… …]
#   create   asks for the machines, and waits until they are there
#   run      installs this checkout's last commit on every worker and starts training there; what follows -- is passed on
#   logs     follows the log of the first worker
#   delete   stops everything and gives the machines back
#   up       create, run, and after a preemption both again, until training ends; where it stopped and there is more to
#            do, only run again, after a pause that doubles, and at most N times (5) without a newer checkpoint
# The same command on every worker makes one run: lrt_jax.main finds the others by itself. The work dir must be one that
# all workers share: with --bucket, the bucket is mounted at /mnt/lrt by gcsfuse, so --workdir=/mnt/lrt/runs/NAME.
# Where something is not committed, run and up stop before they begin: so a run's code has a name, and is the same after
# a preemption. What an image lacks is brought: Python 3.12 by uv where none from 3.11 on has venv, gcsfuse by apt.
# --dry-run prints every command that would be run, quoted for a shell, and runs none.
set -euo pipefail
cd "$(dirname "$0")/.."

dry=
if [[ ${1:-} == --dry-run ]]; then
    dry=1
    shift
fi
usage() {
    sed -n '2,17s/^# \{0,1\}//p' "launch/$(basename "$0")" >&2
    exit 2
}
[[ $# -ge 2 ]] || usage
action=$1 name=$2
shift 2

zone="" project="" type="" version="" slices=1 spot="" bucket="" restarts=5
while [[ $# -gt 0 ]]; do
    case $1 in
        --zone=*) zone=${1#*=} ;;
        --project=*) project=${1#*=} ;;
        --type=*) type=${1#*=} ;;
        --version=*) version=${1#*=} ;;
        --slices=*) slices=${1#*=} ;;
        --bucket=*) bucket=${1#*=} ;;
        --restarts=*) restarts=${1#*=} ;;
        --spot) spot=1 ;;
        --)
            shift
            break
            ;;
        *)
            echo "error: $1 is not an option of launch/tpu_vm.sh; those of training come after --" >&2
            exit 2
            ;;
    esac
    shift
done
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || {
    echo "error: the name is '$name'; it must be lower-case letters, digits and dashes" >&2
    exit 2
}
[[ $slices =~ ^[1-9][0-9]*$ ]] || {
    echo "error: --slices is '$slices'; it must be a number above 0" >&2
    exit 2
}
[[ $restarts =~ ^[0-9]+$ ]] || {
    echo "error: --restarts is '$restarts'; it must be a number" >&2
    exit 2
}

where=()
[[ -z $zone ]] || where+=("--zone=$zone")
[[ -z $project ]] || where+=("--project=$project")

# Runs a command, or with --dry-run prints it so that a shell would read it back as it is.
do_() {
    if [[ -n $dry ]]; then
        printf '%q ' "$@"
        printf '\n'
    else
        "$@"
    fi
}

# Settles which commit is shipped, by every run of an `up`.
commit=HEAD
settle() {
    local changes message
    changes=$(git status --porcelain -- .) || [[ -n $dry ]]
    message="${changes:3}"
    message="${message%%$'\n'*} is not committed, and workers get the last commit; commit what they need, and set the rest aside with: git stash -u"
    if [[ -n $dry ]]; then
        [[ -z $changes ]] || echo "# would stop here: $message"
        return
    fi
    [[ -z $changes ]] || {
        echo "error: $message" >&2
        exit 2
    }
    commit=$(git rev-parse HEAD)
}

state() {
    gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)'
}

create() {
    [[ -n $type ]] || {
        echo "error: --type is not set; for example --type=v5litepod-256, --type=v5p-128 or --type=v6e-256" >&2
        exit 2
    }
    local runtime=$version
    if [[ -z $runtime ]]; then
        case $type in
            v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
            v5p-*) runtime=v2-alpha-tpuv5 ;;
            v6e-*) runtime=v2-alpha-tpuv6e ;;
            *)
                echo "error: no runtime is known for --type=$type; name one with --version" >&2
                exit 2
                ;;
        esac
    fi
    local request=(gcloud compute tpus queued-resources create "$name" "${where[@]}"
        "--accelerator-type=$type" "--runtime-version=$runtime")
    if [[ $slices -gt 1 ]]; then
        request+=("--node-count=$slices" "--node-prefix=$name")
    else
        request+=("--node-id=$name")
    fi
    [[ -z $spot ]] || request+=(--spot)
    do_ "${request[@]}"
    if [[ -n $dry ]]; then
        echo "# then waits until the state is ACTIVE"
        return
    fi
    local now
    while now=$(state) && [[ $now != ACTIVE ]]; do
        case $now in FAILED | SUSPENDED | SUSPENDING)
            echo "error: the queued resource $name is $now" >&2
            return 1
            ;;
        esac
        echo "$name is $now" >&2
        sleep 30
    done
}

# The TPU VMs of the queued resource: one for each slice.
nodes() {
    if [[ $slices -eq 1 ]]; then
        echo "$name"
    else
        for ((i = 0; i < slices; i++)); do echo "$name-$i"; done
    fi
}

# Shell for a worker, which expands it. In .venv, a Python that is new enough: Ubuntu 22.04 has 3.10, often without venv.
# One that an earlier run made stays.
# shellcheck disable=SC2016
python='enough() { "$1" -c "import $2, sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; } &&
{ enough .venv/bin/python pip || {
    rm -rf .venv;
    for python in python3 python3.13 python3.12 python3.11; do enough "$python" ensurepip && break; python=; done;
    if [ -n "$python" ]; then "$python" -m venv .venv; else
        PATH=$HOME/.local/bin:$PATH;
        command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh;
        uv venv --quiet --seed --python 3.12 .venv;
    fi;
}; } && '
# The same for gcsfuse, from Google's repository. A machine that has just started may update its lists itself: that ends.
# shellcheck disable=SC2016
gcsfuse='{ command -v gcsfuse >/dev/null || {
    key=/usr/share/keyrings/cloud.google.asc; google=https://packages.cloud.google.com/apt;
    curl -fsSL $google/doc/apt-key.gpg | sudo tee $key >/dev/null &&
    echo "deb [signed-by=$key] $google gcsfuse-$(. /etc/os-release && echo $VERSION_CODENAME) main" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null &&
    for i in 1 2 3 4 5; do sudo apt-get -qq update && break; sleep 20; done &&
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y gcsfuse >/dev/null;
}; } && '

# What every worker does, as shell in which every argument is quoted. Its last words are how training ended and the
# newest checkpoint, on standard output: whether gcloud hands on an exit code of --worker=all is not known.
remote() {
    local mount="" workdir='runs/*' before="" argument
    for argument in "$@"; do
        if [[ $before == --workdir ]]; then workdir=$(printf %q "$argument"); fi
        if [[ $argument == --workdir=* ]]; then workdir=$(printf %q "${argument#*=}"); fi
        before=$argument
    done
    if [[ -n $bucket ]]; then
        mount="${gcsfuse//$'\n'/ }sudo mkdir -p /mnt/lrt && sudo chown \"\$USER\" /mnt/lrt && (mountpoint -q /mnt/lrt || gcsfuse --implicit-dirs --rename-dir-limit=200000 $(printf %q "$bucket") /mnt/lrt) && "
    fi
    printf '%s' "${mount}mkdir -p lrt-jax && tar --recursive-unlink -xzf lrt-jax.tar.gz -C lrt-jax && cd lrt-jax && ${python//$'\n'/ }" \
        ".venv/bin/python -m pip install --quiet -e '.[gcs]' 'jax[tpu]' && " \
        ".venv/bin/python -m lrt_jax.main --stopped_exit_code=75$(printf ' %q' "$@") >>\$HOME/lrt-jax.log 2>&1; " \
        "code=\$?; step=\$(ls -d $workdir/checkpoints/* 2>/dev/null | sed 's|.*/||' | grep -x '[0-9]*' | sort -n | tail -n 1); " \
        "echo; echo \"lrt-jax ended: exit \$code, step \${step:-0}\"; exit \$code"
}

# How a run ended, by what its workers said, in files: 0 if it is complete, 75 if there is more to do, else the code of a
# worker that failed; where none said anything gcloud's own code, the first argument, or 1. Keeps the newest checkpoint.
newest=0
verdict() {
    local gcloud=$1 code step again=0 said=0
    shift
    while read -r code step; do
        said=1
        if [[ $step -gt $newest ]]; then newest=$step; fi
        case $code in
            0) ;;
            75 | 134) again=75 ;; # 134: aborted, by the watchdog or by jax since another process was lost
            *) return "$code" ;;
        esac
    done < <(sed -n 's/.*lrt-jax ended: exit \([0-9]*\), step \([0-9]*\).*/\1 \2/p' "$@")
    if [[ $again -ne 0 ]]; then return "$again"; fi
    if [[ $said -eq 0 && $gcloud -eq 0 ]]; then return 1; fi
    return "$gcloud"
}

run() {
    local folder="" archive=lrt-jax.tar.gz pids=() failed=0 code=0 node
    if [[ -z $dry ]]; then
        folder=$(mktemp -d)
        archive=$folder/$archive
    fi
    do_ git archive --format=tar.gz "--output=$archive" "$commit" || return
    while read -r node; do
        do_ gcloud compute tpus tpu-vm scp "$archive" "$node:lrt-jax.tar.gz" "${where[@]}" --worker=all </dev/null || return
    done < <(nodes)
    while read -r node; do
        if [[ -n $dry ]]; then
            do_ gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all "--command=$(remote "$@")"
        else # all slices at once: none begins before the others are there
            { gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all "--command=$(remote "$@")" </dev/null |
                tee "$folder/$node.out"; } &
            pids+=($!)
        fi
    done < <(nodes)
    if [[ -n $dry ]]; then return; fi
    for pid in "${pids[@]}"; do wait "$pid" || failed=$?; done
    verdict "$failed" "$folder"/*.out || code=$?
    rm -r "$folder"
    return "$code"
}

logs() {
    local first
    first=$(nodes | head -n 1)
    # The log's path is for the worker's shell.
    # shellcheck disable=SC2016
    do_ gcloud compute tpus tpu-vm ssh "$first" "${where[@]}" --worker=0 '--command=tail -n +1 -F $HOME/lrt-jax.log'
}

delete() {
    do_ gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

up() {
    local code before pause without=0
    create
    if [[ -n $dry ]]; then
        run "$@"
        echo "# where training stopped before its end runs again, after 10 seconds to 10 minutes, at most $restarts times without"
        echo "# a newer checkpoint; after a preemption deletes, creates and runs again; goes on from the last checkpoint"
        delete
        return
    fi
    while true; do
        code=0 before=$newest
        run "$@" || code=$?
        if [[ $code -eq 0 ]]; then break; fi
        if [[ $(state) != ACTIVE ]]; then
            echo "$name was preempted; asking for it again" >&2
            delete
            create
            continue
        fi
        if [[ $code -ne 75 ]]; then
            echo "error: training ended with an error and the machines are still there; see launch/tpu_vm.sh logs $name, then run again or delete" >&2
            return 1
        fi
        if [[ $newest -gt $before ]]; then without=0; else without=$((without + 1)); fi
        if [[ $without -gt $restarts ]]; then
            echo "error: training stopped $without times without a checkpoint after step $newest (--restarts=$restarts), and the" \
                "machines are still there; see launch/tpu_vm.sh logs $name, then run again or delete" >&2
            return 1
        fi
        pause=$((without < 6 ? 10 << without : 600))
        echo "$name stopped before the end, its newest checkpoint is step $newest; running again in $pause seconds" >&2
        sleep "$pause"
    done
    delete
}

case $action in
    create | logs | delete) "$action" ;;
    run | up)
        [[ $# -gt 0 ]] || {
            echo "error: what to train is not set; for example: -- --config=configs/nanochat.py:depth=20 --workdir=/mnt/lrt/runs/d20" >&2
            exit 2
        }
        settle
        "$action" "$@"
        ;;
    *) usage ;;
esac
