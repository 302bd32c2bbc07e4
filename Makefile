# Two commands: `make demo` shows it, `make test` proves it. Both set up .venv first; nothing else needs to be installed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
NATIVE := $(wildcard elastic_ep/*/*.c elastic_ep/*/*/*.c elastic_ep/*/*.h elastic_ep/*/*/*.h elastic_ep/*/*/*/*.h)

.PHONY: demo test test-gpu lint kill-matrix fuzz mutants benchmarks clean

demo: $(VENV)/.installed
	$(BIN)/elastic-ep demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-gpu: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -k "gpu or cuda"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

kill-matrix: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.e2e.kill_matrix

fuzz: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz --hypothesis-profile=long --timeout=3600

mutants: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants --jobs 2

benchmarks: $(VENV)/.installed
	for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "elastic-ep needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1): run make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[serve,mpi,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
