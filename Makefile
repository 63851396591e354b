# PYTHON makes the environment; everything after that runs inside .venv.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: test demo lint types unit build clean

test: lint types unit

demo: .venv/ready
	$(BIN)/python -m bench learn --task text $(ARGS)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

# One torch thread a worker: the tests' tensors are too small to share.
unit: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

build: .venv/ready
	$(BIN)/python -m build

# Where CUDA is wanted, install the torch build for it first; any torch from 2.11 on is kept as it is.
.venv/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf .venv build dist site runs
