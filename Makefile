# Everything a person or a machine runs. `make demo` and `make test` set up by themselves on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/digits.yaml
RUN ?= runs/digits
# Two workers, each with the tests of whole files, because modules share what is slow to make.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: help demo install test test-all test-gpu test-cluster check format study bench image docs-check clean

help:            ## this list
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:  *##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 16

# An environment knows the folder it was made in: a checkout that was moved needs a new one.
MOVED := $(shell test -s $(VENV)/.installed && test "$$(cat $(VENV)/.installed)" != "$(CURDIR)" && echo moved)

$(VENV)/.installed: pyproject.toml constraints.txt $(if $(MOVED),moved)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,score,hub,dev,bench]'
	@echo "$(CURDIR)" > $@

.PHONY: moved
moved:
	@echo "this checkout was moved: making $(VENV) anew"
	@rm -rf $(VENV)

install: $(VENV)/.installed  ## .venv with pinned versions, the package editable, every extra but lightning

demo: install    ## train, score and report on handwritten digits: about six minutes on two cores
	$(BIN)/ddpm-ema features --config $(CONFIG)
	$(BIN)/ddpm-ema train --config $(CONFIG)
	$(BIN)/ddpm-ema score $(RUN)
	$(BIN)/ddpm-ema report $(RUN)

test: install    ## the tests, in at most eight minutes on two cores
	$(PYTEST) -m "not slow and not gpu and not cluster"

test-all: install  ## also the slow ones
	$(PYTEST) -m "not gpu and not cluster" --timeout=1800

test-gpu: install  ## those that need a CUDA device
	$(BIN)/python -m pytest -m gpu

test-cluster: install  ## image and several nodes for real (as root; says what it skipped and why)
	$(BIN)/python -m pytest -m cluster -rs tests/cluster --timeout=3600

check: install   ## lint, format, types, floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_floors.py tests/test_deploy.py

format: install  ## rewrite what `check` would complain of
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

study: install   ## every rule of averaging over several seeds of digits; STUDY=full for the record
	$(BIN)/python benchmarks/study.py runs/study $(if $(filter full,$(STUDY)),--seeds 6 --output benchmarks/results/study.json)

bench: install   ## every benchmark; ratios from interleaved runs, as JSON under benchmarks/results
	for script in averaging averaging_shards conformance train_step sampling scoring checkpoints startup; do $(BIN)/python benchmarks/$$script.py || exit 1; done

docs-check: install  ## run the code blocks of the documentation
	$(BIN)/python -m pytest tests/test_docs.py tests/test_docs_averaging.py -s -m "slow or not slow"

image:           ## the container image
	tests/cluster/build_image.sh

clean:           ## remove what the tools cached (runs stay)
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
