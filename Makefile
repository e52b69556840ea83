# make repro: the whole pipeline; make test: the test suite; make check: ruff and mypy.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# what MLflow and DVC would send home about their use
export MLFLOW_DISABLE_TELEMETRY := true
export DVC_NO_ANALYTICS := true

.PHONY: repro test check install clean

repro: install
	dvc repro
	@synmlops scores

test: install
	pytest

check: install
	ruff format --check .
	ruff check .
	mypy

install: $(VENV)/installed

# pip, not a faster installer: it finds a torch that is already on the machine, whatever its build
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV)
