# Needs make, Python 3.11.4 or newer, pip and venv; everything else is installed into .venv from requirements.txt.
PYTHON ?= python3
UV_VERSION := 0.13.9

VENV := .venv
BIN := $(VENV)/bin
# uv has an environment of its own, so that the one it fills holds exactly what requirements.txt names.
UV := $(VENV)/uv-$(UV_VERSION)/bin/uv
INSTALLED := $(VENV)/installed
# Apart from the others, since whatever imports PEFT or transformers imports these where they are installed.
QUANTISED := $(VENV)/quantised

# The models of the tests are tiny: starting threads costs more than they save. Files are shared among processes instead,
# in their order: the last ones, of tests/tuner, are short.
export OMP_NUM_THREADS ?= 1
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all lint types pins clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## install the pinned packages and this project into .venv

demo: $(INSTALLED)  ## fine-tune a small ViT in a few minutes and draw cluster maps into gift-demo
	$(BIN)/gift demo --out gift-demo

test: $(INSTALLED)  ## run the tests, without the slow ones
	$(PYTEST) -m "not slow"

test-all: $(INSTALLED) $(QUANTISED)  ## run every test, then those of quantised backbones
	$(PYTEST) --ignore tests/tuner/test_quantised.py
	PYTHONPATH=$(QUANTISED) $(BIN)/python -m pytest tests/tuner/test_quantised.py

lint: $(INSTALLED)  ## check style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)  ## check the types of src
	$(BIN)/basedpyright

pins: $(UV)  ## write the requirements files anew from pyproject.toml
	UV_CUSTOM_COMPILE_COMMAND="make pins" $(UV) pip compile pyproject.toml --quiet --extra dev --generate-hashes \
		--no-emit-index-url --python-version 3.11 --universal --output-file requirements.txt
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"] \
		["quantised"], sep="\n")' | UV_CUSTOM_COMPILE_COMMAND="make pins" $(UV) pip compile - --quiet --no-deps \
		--generate-hashes --no-emit-index-url --python-version 3.11 --universal --output-file requirements-quantised.txt

clean:  ## remove .venv, caches and build leftovers
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Compiled at once: where Python is told to write no byte code, as in many containers, each process compiles 5,000 files.
$(INSTALLED): requirements.txt pyproject.toml | $(UV)
	@echo "Installing the packages of requirements.txt into $(VENV) (about 6 GB the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv --without-pip $(VENV)
	@$(UV) pip sync --quiet --require-hashes --compile-bytecode --python $(BIN)/python requirements.txt
	@$(UV) pip install --quiet --no-deps --no-build-isolation --python $(BIN)/python --editable .
	@touch $@

$(QUANTISED): requirements-quantised.txt | $(INSTALLED)
	@rm -rf $@
	@$(UV) pip install --quiet --no-deps --require-hashes --python $(BIN)/python --target $@ \
		--requirements requirements-quantised.txt
	@touch $@

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11.4 or newer is needed, and this is " + sys.version.split()[0] + \
		": name another, as in make setup PYTHON=python3.12" if sys.version_info < (3, 11, 4) else 0)'
	@$(PYTHON) -m venv $(VENV)/uv-$(UV_VERSION)
	@$(VENV)/uv-$(UV_VERSION)/bin/python -m pip install --quiet uv==$(UV_VERSION)
