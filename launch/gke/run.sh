#!/usr/bin/env bash
# Train on TPU slices of a GKE cluster, as a JobSet:
#   launch/gke/run.sh [--dry-run] NAME --image=IMAGE --accelerator=tpu-v5-lite-podslice --topology=16x16 --hosts=64
#                     [--chips=4] [--slices=N] [--bucket=BUCKET] [--namespace=…] [--spot] [-- --config=… --workdir=… …]
# IMAGE holds this repository with its environment, `lrt_jax` importable by `python`: launch/gke/Dockerfile builds one.
# --hosts is how many machines a slice has, --chips how many chips a machine. GKE tells every pod who the others are, and
# lrt_jax.main finds them by itself. The cluster needs JobSet 0.6 or newer.
# The work dir must be one that all pods share: with --bucket, a bucket is mounted at /mnt/lrt (Cloud Storage FUSE CSI
# driver 1.17.2 or newer; the namespace's default service account must be allowed to write to it). A pod that is preempted
# ends the others, and the JobSet starts all of them again: the same command goes on from the last checkpoint. An error
# (exit 1) ends the JobSet. To look, to begin again after an error or the end, and to stop:
#   kubectl logs --follow --selector=jobset.sigs.k8s.io/jobset-name=NAME,batch.kubernetes.io/job-completion-index=0
#   kubectl delete jobset NAME      a JobSet is not changed or begun again by the same name: delete it, then run this again
# --dry-run prints the manifest and the command that would apply it, and applies nothing.
set -euo pipefail
cd "$(dirname "$0")"

dry=
if [[ ${1:-} == --dry-run ]]; then
    dry=1
    shift
fi
name=${1:-}
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || {
    echo "error: the name is '$name'; it must come first, of lower-case letters, digits and dashes" >&2
    exit 2
}
shift
image="" accelerator="" topology="" hosts="" chips=4 slices=1 bucket="" namespace=default spot=""
while [[ $# -gt 0 ]]; do
    case $1 in
        --image=*) image=${1#*=} ;;
        --accelerator=*) accelerator=${1#*=} ;;
        --topology=*) topology=${1#*=} ;;
        --hosts=*) hosts=${1#*=} ;;
        --chips=*) chips=${1#*=} ;;
        --slices=*) slices=${1#*=} ;;
        --bucket=*) bucket=${1#*=} ;;
        --namespace=*) namespace=${1#*=} ;;
        --spot) spot=1 ;;
        --)
            shift
            break
            ;;
        *)
            echo "error: $1 is not an option of launch/gke/run.sh; those of training come after --" >&2
            exit 2
            ;;
    esac
    shift
done
for pair in "hosts=$hosts" "chips=$chips" "slices=$slices"; do
    [[ ${pair#*=} =~ ^[1-9][0-9]*$ ]] || {
        echo "error: --${pair%%=*} is '${pair#*=}'; it must be a number above 0" >&2
        exit 2
    }
done
for pair in "image=$image" "accelerator=$accelerator" "topology=$topology"; do
    [[ ${pair#*=} =~ ^[A-Za-z0-9][-A-Za-z0-9_.:/@]*$ ]] || {
        echo "error: --${pair%%=*} is '${pair#*=}'; it must be set, of letters, digits and -_.:/@" >&2
        exit 2
    }
done
for pair in "bucket=$bucket" "namespace=$namespace"; do
    [[ ${pair#*=} =~ ^[-a-z0-9_.]*$ ]] || {
        echo "error: --${pair%%=*} is '${pair#*=}'; it must be of lower-case letters, digits and -_." >&2
        exit 2
    }
done
[[ $# -gt 0 ]] || {
    echo "error: what to train is not set; for example: -- --config=configs/nanochat.py:depth=20 --workdir=/mnt/lrt/runs/d20" >&2
    exit 2
}

# A string of JSON, which YAML reads as it is.
json() {
    local text=$1
    text=${text//\$(/\$\$(} # which Kubernetes would expand
    text=${text//\\/\\\\}
    text=${text//\"/\\\"}
    text=${text//$'\n'/\\n}
    text=${text//$'\t'/\\t}
    text=${text//$'\r'/\\r}
    printf '"%s"' "$text"
}

manifest() {
    local command line
    command=$(json python)
    for argument in -m lrt_jax.main --stopped_exit_code=75 "$@"; do command+=", $(json "$argument")"; done
    while IFS= read -r line; do
        case $line in
            *'# if spot') [[ -n $spot ]] || continue ;;
            *'# if bucket') [[ -n $bucket ]] || continue ;;
        esac
        line=${line%% # if *}
        line=${line//@NAME@/$name}
        line=${line//@NAMESPACE@/$namespace}
        line=${line//@IMAGE@/$image}
        line=${line//@ACCELERATOR@/$accelerator}
        line=${line//@TOPOLOGY@/$topology}
        line=${line//@HOSTS@/$hosts}
        line=${line//@CHIPS@/$chips}
        line=${line//@SLICES@/$slices}
        line=${line//@BUCKET@/$bucket}
        # Last, and alone on its line: arguments may contain anything.
        if [[ $line == *@COMMAND@* ]]; then line=${line%%@COMMAND@*}[$command]; fi
        printf '%s\n' "$line"
    done <jobset.yaml
}

if [[ -n $dry ]]; then
    echo "# kubectl apply -f -, with this on its standard input:"
    manifest "$@"
else
    manifest "$@" | kubectl apply -f -
fi
