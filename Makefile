PYTHON ?= python3
VENV ?= .venv
PORT ?= 8000
TEST_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.DELETE_ON_ERROR:
.PHONY: help demo test bench lint types docs check clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s%s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed-demo ## Serve the example app on its SQLite file (PORT=8000)
	PORT=$(PORT) $(BIN)/python -m examples.countries

test: $(VENV)/.installed-test ## Run the whole suite (TEST_ARGS="-k commit" for a part)
	$(BIN)/python -m pytest --numprocesses=4 --dist=worksteal $(TEST_ARGS)

bench: $(VENV)/.installed-bench ## Measure against other ways (BENCH_ARGS="--quick" for a short run)
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

lint: $(VENV)/.installed-dev ## Check the style of the code
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check

types: $(VENV)/.installed-dev ## Check the types
	$(BIN)/python -m mypy

docs: $(VENV)/.installed-dev ## Build the documentation into build/docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --builder html docs build/docs

check: lint types docs test ## All four checks

clean: ## Remove everything that was built, the venv too
	rm -rf $(VENV) build dist .coverage htmlcov .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The pip of a bare venv does not know dependency groups.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade 'pip>=25.1'

# One stamp for each group of pyproject.toml that was installed.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(PIP) --editable . --group $*
	touch $@
