#!/bin/sh
# Train on this machine, in the environment that `make train` or `make test` has set up:
#   launch/local.sh [--config=configs/base.py] [--workdir=DIR] [--config.key=value …]
#   launch/local.sh --dry-run …     print the command only
set -eu
cd "$(dirname "$0")/.."
run=exec
if [ "${1:-}" = --dry-run ]; then
    run=echo
    shift
fi
case " $*" in
    *" --config="*) ;;
    *) set -- --config=configs/base.py "$@" ;;
esac
$run .venv/bin/python -m lrt_jax.main "$@"
