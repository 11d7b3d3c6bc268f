#!/usr/bin/env bash
# The rows of docs/SCALING.md: compiles the train step of each for a TPU slice, one after the other (minutes each).
# Needs libtpu: pip install -e '.[aot]'.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
row() { # variant topology slices rows data
    .venv/bin/python -m lrt_jax.aot "--config=configs/nanochat.py:$1" "--topology=$2" "--slices=$3" --program=train --row \
        "--config.train.batch_size=$4" "--config.mesh.data=$5" --config.mesh.fsdp=32
}
for variant in depth=20,memory=shared depth=20,memory=layerwise depth=24,memory=shared; do
    row "$variant" v5e:16x16 1 256 8
    row "$variant" v5p:4x4x4 1 256 2
    row "$variant" v6e:16x16 1 256 8
    row "$variant" v5e:16x16 2 512 16
done
