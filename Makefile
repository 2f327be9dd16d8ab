# What is run by hand or by CI. `make` alone lists it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types smoke claims bench all

help: ## list what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## create .venv and install rlx into it, in the versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 13); sys.exit(None if ok else f"rlx needs Python 3.11 to 3.13, {sys.executable} is {sys.version.split()[0]}: make PYTHON=python3.12 setup")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## train recipe=grpo_math: SFT, then GRPO beside more SFT; prints the final table
	$(BIN)/rlx train recipe=grpo_math

test: $(READY) ## run the tests in two processes of one thread
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(READY) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## mypy --strict
	$(BIN)/mypy

smoke: $(READY) ## check every recipe, then run two steps of each
	$(BIN)/rlx check --all
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/smoke

claims: $(READY) ## rlx reproduce for every recipe with a claim, into docs/results; goes on where it was stopped
	$(BIN)/python scripts/claims.py

bench: $(READY) ## rlx beside TRL, a line a workload (scripts/bench.py --help); fails where a ratio fell by more than 5 %
	$(BIN)/python scripts/bench.py
	$(BIN)/python scripts/bench.py --memory

all: lint types test ## lint, types and test
