# Everything needs only Python >= 3.11 (with pip and venv) and make: each target sets up .venv first.
# Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types format docs lock clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1	\2/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(INSTALLED) ## create .venv from requirements.lock and install stpredict into it (editable)

# The stamp is written last: an interrupted set-up is taken up again, a finished one costs nothing.
$(INSTALLED): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python >= 3.11, or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "stpredict needs Python >= 3.11, but $(PYTHON) is %d.%d: name another one, e.g. make PYTHON=python3.12" % v[:2])'
	@echo "Installing the pinned packages into .venv (some minutes the first time) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(INSTALLED) ## fit and draw on the embedded synthetic data; pictures go to demo/
	MPLBACKEND=agg $(BIN)/python tutorials/quickstart.py

test: lint types ## lint, types and all tests, with branch coverage
	OMP_NUM_THREADS=1 MPLBACKEND=agg $(BIN)/python -m pytest -n 2 --cov=stpredict

lint: $(INSTALLED) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED) ## mypy
	$(BIN)/mypy

format: $(INSTALLED) ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED) ## build the documentation into docs/_build/html
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

# Newest versions that go together, from pyproject.toml. Accelerator packages stay out: pip adds what
# the torch of each platform asks for.
lock: ## rewrite requirements.lock
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	build/lock/bin/python -m pip install --group test --group doc --group dev .
	build/lock/bin/python -m pip freeze --all \
	| sed -e 's/+.*//' -e '/^\(pip\|wheel\|triton\|nvidia-.*\|cuda-.*\|stpredict-.*\)\(==\| @ \)/d' > requirements.lock

clean: ## remove everything that was built, except .venv
	rm -rf build dist demo docs/_build docs/tutorials docs/generated docs/api/generated .coverage .coverage.* coverage.xml
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests tutorials benchmarks -name __pycache__ -type d -exec rm -rf {} +
