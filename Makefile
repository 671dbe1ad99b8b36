# Five words: demo, test, lint, docs, bench. Each sets up what it needs on a fresh machine.
# `make test` runs every test; `make test-fast` leaves out those marked slow, for use while you work.
PYTHON ?= python3.11
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-fast test-oldest lint docs bench

# torch comes first and pinned: an unpinned torch would fetch gigabytes of CUDA libraries.
$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

# DeepSpeed comes as source and asks the torch that is there how to build; none of its kernels are.
$(VENV)/.deepspeed: $(VENV)/.ready
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) 'setuptools>=77' wheel
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --no-build-isolation deepspeed
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python recipes/sft.py recipes/quickstart.yaml

test: $(VENV)/.deepspeed
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: $(VENV)/.deepspeed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Into site/, without the network; a broken link or a docstring that cannot be read is an error.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --site-dir site

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/run.py
