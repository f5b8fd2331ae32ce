# The contributor's whole interface. `make demo` and `make test` install what they need first.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup-done
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

# The data folder that lies beside this checkout on our machines; elsewhere assets come from their public sources.
ifneq ($(wildcard ../shared/data),)
export TINYEMO_MIRROR ?= $(abspath ../shared/data)
endif
export PATH := $(abspath $(BIN)):$(PATH)
export PYTHONUNBUFFERED := 1

.PHONY: setup demo test smoke test-gpu lint bench down clean
.DEFAULT_GOAL := help

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

setup: $(SETUP) ## Create .venv with the tested versions; compile DeepSpeed's CPU collectives once

# torch goes first and alone: a range would let pip fetch gigabytes of CUDA packages.
$(SETUP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@echo "compiling DeepSpeed's CPU collectives (about half a minute)"
	$(BIN)/python -m orchestration.services.engine
	touch $(SETUP)

demo: setup ## Bring up the platform, train the family on Emotion6 from S3, show the results; leaves the platform up
	tinyemo platform up
	if tinyemo assets get emotion6; then tinyemo ingest features emotion6 --name emotion6; \
	else echo "##### NO DATA WITHIN REACH: going on with GENERATED features; the figures mean nothing #####"; \
	tinyemo ingest features --generated --name generated; fi
	. $${TINYEMO_STATE:-.tinyemo}/platform.env; ray job submit -- tinyemo family \
	$$(tinyemo assets get emotion6 >/dev/null 2>&1 && echo family || echo family --set name=family-generated \
	--set data.dataset=s3://tinyemo/datasets/generated)
	tinyemo platform status

test: setup ## The whole suite but gpu
	$(BIN)/python -m pytest -m "not gpu" --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 15

smoke: setup ## The tests that need no server, under two minutes; for the moment before a commit
	$(BIN)/python -m pytest -q -m "not server and not slow and not cluster and not gpu" --numprocesses 2 --dist loadfile

test-gpu: setup ## The tests that need a GPU
	$(BIN)/python -m pytest -m gpu

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup ## Measure everything (hours on 2 cores); writes benchmarks/results/*.json
	tinyemo platform up
	tinyemo assets get emotion6 && tinyemo ingest features emotion6 --name emotion6
	tinyemo ingest oasis
	for name in projector search streaming lm; do $(BIN)/python benchmarks/$$name.py || exit 1; done

down: ## End the local platform
	$(BIN)/tinyemo platform down

clean: ## Remove the environment and the platform's state (end the platform first)
	rm -rf $(VENV) .tinyemo
