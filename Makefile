# Every target sets itself up: `make demo` and `make test` work from a fresh clone.
# The environment is .venv in this checkout; another interpreter is chosen by `make PYTHON=python3.12 ...` before it exists.

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$python; break; }; done)
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.jdiff-installed

.PHONY: help setup demo test test-slow lint format docs smoke clean
.DEFAULT_GOAL := help

help:
	@echo "make demo        train on the 8x8 digits, bits/dim, samples and runs/digits/report.html (minutes, no GPU)"
	@echo "make test        the fast tests            make test-slow   the slow ones"
	@echo "make lint        ruff and mypy             make smoke       the demo in seconds, in a temporary folder"
	@echo "make docs        the site, build/site      make setup       only the environment"
	@echo "make clean       remove all of it"

setup: $(READY)

demo: $(READY)
	$(RUN) -m experiments.demo $(ARGS)

test: $(READY)
	$(RUN) -m pytest -m "not slow" $(ARGS)

test-slow: $(READY)
	JDIFF_TEST_OPTIMISED=1 $(RUN) -m pytest -m slow $(ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

docs: $(READY)
	JAX_PLATFORMS=cpu $(RUN) -m sphinx -W --keep-going -q -c docs -d build/doctrees . build/site
	@echo "build/site/index.html"

smoke: $(READY)
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	$(RUN) -m experiments.demo --smoke --workdir "$$folder" $(ARGS)

clean:
	rm -rf $(VENV) .jax_cache build dist docs/reference *.egg-info

$(READY): setup.cfg pyproject.toml
	@test -x $(RUN) || test -n "$(PYTHON)" || { \
		echo "jdiff needs Python 3.11 or newer; none was found. Install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; \
		exit 1; }
	@test -x $(RUN) || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "jdiff needs Python 3.11 or newer, and $(PYTHON) is not: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[experiments,test,docs,dev]'
	@touch $@
