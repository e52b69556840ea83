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

# threads that wait spin by default, and there are as many for each process as there are cores; three files at a
# time keep two cores busy, since tests wait for servers and for processes that they killed
test: install
	OMP_WAIT_POLICY=passive pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

check: install
	ruff format --check .
	ruff check .
	mypy

install: $(VENV)/installed

# A torch that is there already is kept, whatever its build: in .venv, or in the Python that makes it. Otherwise
# pip takes the pinned one, from a local wheel folder if pip knows one, else from the package index.
PIN := constraints.txt
$(VENV)/installed: pyproject.toml $(PIN)
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV) \
	  $$($(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages)
	@if $(VENV)/bin/python -c 'import torch' 2>/dev/null; then grep -v '^torch==' $(PIN) > $(VENV)/pin.txt; \
	  else cp $(PIN) $(VENV)/pin.txt; fi
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c $(VENV)/pin.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV)
