# make train: set everything up, then train the default model on the embedded corpus.
# make test:  set everything up, then run the tests.
# make compare: train the default model and its plain baseline at equal compute.
# make install: only set everything up.
PYTHON ?= python3
VENV ?= .venv
# Which jax to install: cuda13 beside an NVIDIA driver from 580 on, cuda12 beside an older one (and by hand for GPUs
# before Turing, which CUDA 13 has dropped), tpu on a TPU VM, else the CPU build.
ACCELERATOR ?= $(shell driver=$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | sed -n '1s/[.].*//p'); \
	if [ "$$driver" -ge 580 ] 2>/dev/null; then echo cuda13; elif [ "$$driver" -ge 0 ] 2>/dev/null; then echo cuda12; \
	elif [ -e /dev/accel0 ] || [ -e /dev/vfio/0 ]; then echo tpu; fi)
CONFIG ?= configs/base.py
ARGS ?=
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := train
.PHONY: install train compare check test test-faults lint types format clean

install: $(INSTALLED)

train: $(INSTALLED)
	$(RUN) -m lrt_jax.main --config=$(CONFIG) $(ARGS)

compare: $(INSTALLED)
	$(RUN) -m lrt_jax.sweep configs/sweeps/default.py $(ARGS)

test: $(INSTALLED)
	$(RUN) -m pytest -n 2 --dist loadfile $(ARGS)

# Lint, types and the tests that take no time: what to run between two edits.
check: lint types
	$(RUN) -m pytest -n 2 --dist loadfile -m "not slow and not faults" $(ARGS)

# Every fault that is known to kill runs, done to small ones; the default tests do a part of it.
test-faults: $(INSTALLED)
	$(RUN) -m pytest -m "faults or not faults" tests/faults tests/test_inventory.py $(ARGS)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(INSTALLED)
	$(VENV)/bin/mypy lrt_jax configs

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lrt_jax needs Python 3.11 or newer, found " + sys.version.split()[0] + "; choose one with: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -e '.[dev]' $(if $(ACCELERATOR),'jax[$(ACCELERATOR)]')
	touch $@
