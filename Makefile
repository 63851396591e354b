# PYTHON makes the environment; everything after that runs inside .venv.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: test demo lint types unit docs docs-serve docs-test build install-test clean

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

# The notice that this silences is about the next major version of mkdocs.
MKDOCS := NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(BIN)/python -m mkdocs

docs: .venv/docs
	$(MKDOCS) build --strict

docs-serve: .venv/docs
	$(MKDOCS) serve

# Needs Chromium: apt-get install chromium. A folder in ARGS takes pictures of every page.
docs-test: docs
	$(BIN)/python docs/make/browse.py $(ARGS)

build: .venv/ready
	rm -rf dist
	$(BIN)/python -m build --no-isolation

# The wheel alone in an environment with what it requires and no more.
install-test: build
	$(BIN)/python .ci/clean_install.py dist/*.whl

# Where CUDA is wanted, install the torch build for it first; any torch from 2.11 on is kept as it is.
.venv/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@

.venv/docs: .venv/ready
	$(BIN)/pip install --quiet --editable ".[docs]"
	touch $@

clean:
	rm -rf .venv build dist site runs
