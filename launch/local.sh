#!/bin/sh
# Train on this machine, in the environment that `make install`, or `make train`, has set up:
#   launch/local.sh [--config=configs/base.py] [--workdir=DIR] [--config.key=value …]
#   launch/local.sh --dry-run …     print the command only, quoted for a shell
set -eu
cd "$(dirname "$0")/.."
dry=
if [ "${1:-}" = --dry-run ]; then
    dry=1
    shift
fi
given=
for argument in "$@"; do
    case $argument in --config=*) given=1 ;; esac
done
[ -n "$given" ] || set -- --config=configs/base.py "$@"
set -- .venv/bin/python -m lrt_jax.main "$@"
if [ -z "$dry" ]; then
    [ -x "$1" ] || {
        echo "error: there is no $1 in $PWD; make install sets it up" >&2
        exit 2
    }
    exec "$@"
fi
for word in "$@"; do
    printf "'%s' " "$(printf %s "$word" | sed "s/'/'\\\\''/g")"
done
printf '\n'
