# make demo: the main job on built-in images. make test: the tests. Both make .venv first if need be.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

BENCH := .venv-bench

.PHONY: demo test lint types bench bench-peers bench-table gpu-check

demo: $(VENV)/.installed
	$(BIN)/python -m fastadv.train --strategy roli-full

# A process per core and one thread in each: half the time of one process with all threads.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --benchmark-disable

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

bench: $(VENV)/.installed-test
	$(BIN)/python -m pytest benchmarks/ --benchmark-only

# Against torchattacks, foolbox, ART and cleverhans, in an environment of their own; about half an hour on two cores.
bench-peers: $(BENCH)/.installed
	$(BENCH)/bin/python benchmarks/peers.py --resume

# The README's tables and their plot, from benchmarks/results.
bench-table: $(VENV)/.installed
	$(BIN)/python benchmarks/table.py --write

# On a GPU machine, without network, into the Python that runs it; under ten minutes.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

# torch's ordinary wheels work without a GPU too; the CPU-only one breaks torchvision's import.
$(VENV)/.installed: setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[test]"
	touch $@

$(BENCH)/.installed: setup.py pyproject.toml
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet -e ".[bench]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet -e ".[test,dev]"
	touch $@
