# The contributor's whole interface. `make demo` and `make test` install what they need first.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup-done
TOOLS := $(VENV)-tools
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

# The data folder that lies beside this checkout on our machines; elsewhere assets come from their public sources.
ifneq ($(wildcard ../shared/data),)
export TINYEMO_MIRROR ?= $(abspath ../shared/data)
endif
export PATH := $(abspath $(BIN)):$(PATH)
export PYTHONUNBUFFERED := 1

.PHONY: setup lock audit licences demo test smoke test-gpu lint bench down clean
.DEFAULT_GOAL := help

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

setup: $(SETUP) ## Create .venv with the tested versions; compile DeepSpeed's CPU collectives once

# torch goes first and alone: a range would let pip fetch gigabytes of CUDA packages. It is pinned by its version, not by
# a hash, because its builds for CPU and CUDA differ. Everything else must have the hash that the lock names.
$(SETUP): pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	$(BIN)/python -m pip check
	@echo "compiling DeepSpeed's CPU collectives (about half a minute)"
	$(BIN)/python -m orchestration.services.engine
	touch $(SETUP)

demo: setup ## Bring up the platform, train the family on Emotion6 from S3, evaluate and report; leaves the platform up
	tinyemo platform up
	if tinyemo assets get emotion6; then tinyemo ingest features emotion6 --name emotion6; \
	else echo "##### NO DATA WITHIN REACH: going on with GENERATED features; the figures mean nothing #####"; \
	tinyemo ingest features --generated --name generated; fi
	. $${TINYEMO_STATE:-.tinyemo}/platform.env; ray job submit -- tinyemo family \
	$$(tinyemo assets get emotion6 >/dev/null 2>&1 && echo family || echo family --set name=family-generated \
	--set data.dataset=s3://tinyemo/datasets/generated)
	tinyemo evaluate evaluate-champion \
	$$(tinyemo assets get emotion6 >/dev/null 2>&1 || echo --set data.test-split.dataset=s3://tinyemo/datasets/generated)
	tinyemo platform status
	tinyemo report models:/tinyemo-projector@champion --output $${TINYEMO_STATE:-.tinyemo}/champion.html

test: setup ## The whole suite but gpu
	$(BIN)/python -m pytest -m "not gpu" --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 15

smoke: setup ## The tests that need no server; for the moment before a commit
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

$(TOOLS): Makefile
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet uv==0.13.9 pip-audit==2.10.1 pip-licenses==5.5.5
	touch $(TOOLS)

lock: setup $(TOOLS) ## Write requirements.lock anew: the versions of constraints.txt with the hashes of all their files
	$(TOOLS)/bin/uv pip compile pyproject.toml --extra dev --constraint constraints.txt --generate-hashes --no-header \
	--no-annotate --no-emit-package torch $(addprefix --find-links ,$(PIP_FIND_LINKS)) --python $(BIN)/python --quiet --output-file requirements.lock

audit: $(TOOLS) ## Look up the locked packages in the database of known vulnerabilities
	@$(TOOLS)/bin/pip-audit --requirement requirements.lock --no-deps --disable-pip --strict --progress-spinner off \
	>$(TOOLS)/audit.log 2>&1 && cat $(TOOLS)/audit.log || { if grep -q "^Name .*ID" $(TOOLS)/audit.log; \
	then cat $(TOOLS)/audit.log; echo "##### VULNERABLE PACKAGES: see above #####"; \
	else echo "##### NOT AUDITED: the database of vulnerabilities cannot be reached from here; see $(TOOLS)/audit.log #####"; fi; exit 1; }

licences: setup $(TOOLS) ## Write docs/licences.md: the licence of every package in the environment
	{ echo "# Licences of the installed packages"; echo; echo "Written by \`make licences\` from the packages' own metadata."; echo; \
	$(TOOLS)/bin/pip-licenses --python $(BIN)/python --from mixed --format markdown --order name \
	--ignore-packages tinyemo-on-ray | sed 's/^ *//; s/ *|/ |/g; s/-\{4,\}/---/g'; } >docs/licences.md

down: ## End the local platform
	$(BIN)/tinyemo platform down

clean: ## Remove the environment and the platform's state (end the platform first)
	rm -rf $(VENV) $(TOOLS) .tinyemo
