# The commands of this project. Everything is installed into .venv and nowhere else; a second call is quick.
PYTHON ?= python3
PORT ?= $(or $(WIDTHWISE_PORT),8000)
WIDTHWISE_DATA_DIR ?= ./var
PYTEST_ARGS ?= -n 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

export WIDTHWISE_DATA_DIR

.PHONY: help serve demo test lint format constraints clean
.DELETE_ON_ERROR:

help:
	@echo "make serve        install the service (no torch), migrate, load the demo chain, serve on 127.0.0.1:$(PORT)"
	@echo "make demo         three devices with different limits ask the running service for a model"
	@echo "make test         install everything, then linters, types, import contracts and tests"
	@echo "make lint         the linters, types and import contracts alone"
	@echo "make format       rewrite the code in the house format"
	@echo "make constraints  look up the newest versions that pyproject.toml allows and pin them"
	@echo "make clean        remove .venv and caches; data stays"

serve: $(VENV)/.serve
	$(BIN)/widthwise serve --port $(PORT)

demo: $(VENV)/.serve
	$(BIN)/widthwise demo --url http://127.0.0.1:$(PORT)

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS) --ignore=tests/system
	$(BIN)/python -m pytest tests/system

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

constraints:
	rm -rf build/constraints
	$(PYTHON) -m venv build/constraints
	build/constraints/bin/pip install --quiet -e '.[dev]'
	{ sed -n '/^#/p' constraints.txt; \
	  build/constraints/bin/pip freeze --exclude-editable | sed 's/^torch==\([0-9.]*\).*/torch==\1/' | LC_ALL=C sort -f; \
	} > build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build/constraints

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Widthwise needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.serve: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt -e .
	@touch $@

# The test install holds the serving install, so `make serve` after it has nothing left to do.
$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.serve $@
