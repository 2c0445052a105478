# Everything runs in .venv; every target is safe to run twice.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
EXPERIMENT ?= experiments/quickstart.yaml
BIN := .venv/bin
export DISTILL_EXPERIMENT = $(EXPERIMENT)
export DAGSTER_HOME = $(CURDIR)

.PHONY: help quickstart test check dev clean

help:  ## what the targets do
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found; run: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.run: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dagster]'
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: .venv/.run  ## install, fetch the default teacher, make every artifact, print the comparison
	$(BIN)/python -m assets.slots
	DISTILL_EXECUTOR=in_process $(BIN)/dagster asset materialize -m assets.definitions --select '*' \
		--config-json '{"loggers": {"console": {"config": {"log_level": "INFO"}}}}'
	@$(BIN)/distill compare $(EXPERIMENT)

test: .venv/.dev  ## static checks, then all tests that need no network and no GPU
	scripts/check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

check: .venv/.dev  ## static checks only
	scripts/check

dev: .venv/.run  ## the Dagster UI on http://127.0.0.1:3000
	$(BIN)/dagster dev

clean:  ## remove what was made here: artifacts, run history, the environment
	rm -rf data .dagster .venv
