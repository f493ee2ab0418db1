# `make report` and `make test` need only Python 3.11-3.13: they set up .venv themselves, once.
PYTHON ?= python3
MODEL  ?= tiny-turbo
SCALE  ?= demo

# Two threads help a little on a free machine; that they wait passively keeps them from fighting for a busy one.
export OMP_NUM_THREADS ?= 2
export OMP_WAIT_POLICY ?= passive
export KMP_BLOCKTIME ?= 0
export PIP_DISABLE_PIP_VERSION_CHECK = 1

BIN   := .venv/bin
READY := .venv/.ready

.PHONY: help env report test test-all lint format notebooks-clean mutate docs dist audit release clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 20

env: $(READY)  ## set up .venv

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit(f"Python {v[0]}.{v[1]} found, 3.11 to 3.13 needed: make PYTHON=python3.12 env")'
	@echo "Setting up .venv (a few minutes the first time)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[dev]"
	@touch $@

report: $(READY)  ## run every notebook, write one offline HTML file, print its path (SCALE=smoke|demo, MODEL=tiny-turbo)
	$(BIN)/python -m sdxl_sae_kit report --scale $(SCALE) --model $(MODEL)

test: $(READY)  ## run the tests, without the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-all: $(READY)  ## run all tests, with more examples of each property, and say what share of the lines they run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --cov --hypothesis-profile thorough

mutate: $(READY)  ## change metrics and formats line by line and say which changes no test notices; takes hours
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children 1
	$(BIN)/mutmut results

lint: $(READY)  ## check style, types, import contracts, spelling and that notebooks carry no outputs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/codespell
	$(BIN)/nbstripout --keep-id --verify notebooks/*.ipynb

format: $(READY)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks-clean: $(READY)  ## strip the outputs of the notebooks
	$(BIN)/nbstripout --keep-id notebooks/*.ipynb

docs: $(READY)  ## write the API reference from the docstrings to build/api
	$(BIN)/python docs/api/build.py build/api

dist: $(READY)  ## build wheel and sdist into dist
	rm -rf dist
	$(BIN)/python -m build --no-isolation

audit: $(READY)  ## look up known vulnerabilities of the packages in constraints.txt; needs a network
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[release]"
	$(BIN)/python .ci/audit

release: $(READY)  ## check that version, changelog and tag agree, build, and say how to publish
	.ci/release

clean:  ## remove .venv, what was built, and tool caches; artifacts stay
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
