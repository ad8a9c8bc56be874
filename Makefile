# Everything needs only Python >= 3.11 (with pip and venv) and make: each target sets up .venv first.
# Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
ENVIRONMENTS := .venv-lowest .venv .venv-newest

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-lowest test-newest test-exchange newest lint types format docs
.PHONY: wheelhouse rehearse bare lock clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(INSTALLED) ## create .venv from requirements.lock and install stpredict into it (editable)

define check_python
@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python >= 3.11, or name one: make PYTHON=/path/to/python" >&2; exit 1; }
@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "stpredict needs Python >= 3.11, but $(PYTHON) is %d.%d: name another one, e.g. make PYTHON=python3.12" % v[:2])'
endef

# The stamp is written last: an interrupted set-up is taken up again, a finished one costs nothing.
$(INSTALLED): requirements.lock pyproject.toml
	$(check_python)
	@echo "Installing the pinned packages into .venv (some minutes the first time) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(INSTALLED) ## fit and draw on the embedded synthetic data; pictures go to demo/
	MPLBACKEND=agg $(BIN)/python tutorials/quickstart.py

test: lint types ## lint, types and all tests, with branch coverage
	OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 MPLBACKEND=agg $(BIN)/python -m pytest -n 2 --cov=stpredict

# The same tests at both ends of what pyproject.toml allows, each in an environment of its own. `test` lies between.
test-lowest: .venv-lowest/.installed ## all tests with the oldest versions that pyproject.toml allows
	$(call run_tests,.venv-lowest)

test-newest: newest ## all tests with the newest versions of the day (torch brings CUDA: about 7 GB)
	$(call run_tests,.venv-newest)

# Not part of `test`: each environment reads what each has written.
test-exchange: $(INSTALLED) .venv-lowest/.installed newest ## h5ad, zarr and models of each environment are read by the others
	for e in $(ENVIRONMENTS); do MPLBACKEND=agg TQDM_DISABLE=1 $$e/bin/python tests/exchange/exchange.py write build/exchange/$$e || exit 1; done
	for e in $(ENVIRONMENTS); do MPLBACKEND=agg TQDM_DISABLE=1 $$e/bin/python tests/exchange/exchange.py read $(ENVIRONMENTS:%=build/exchange/%) || exit 1; done

define run_tests
@$(1)/bin/python -m pip list --format freeze | grep -E '^(anndata|dask|numpy|pandas|scanpy|spatialdata.*|squidpy|torch|zarr)=='
OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 MPLBACKEND=agg $(1)/bin/python -m pytest -n 2
endef

# Asked for anew each time, because what is newest changes.
newest:
	$(check_python)
	@test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	@echo "Bringing .venv-newest up to date (some minutes the first time) ..."
	@.venv-newest/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	@.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --group test -e .

# Every `"name>=version"` among the dependencies becomes `name==version`: floors that do not go together fail here.
.venv-lowest/.installed: pyproject.toml
	$(check_python)
	@echo "Installing the oldest versions of pyproject.toml into .venv-lowest (some minutes) ..."
	@$(PYTHON) -m venv --clear .venv-lowest
	@sed -n '/^dependencies/,/^\]/s/^  "\([a-zA-Z0-9_-]*\)>=\([0-9.]*\)",$$/\1==\2/p' pyproject.toml > .venv-lowest/floors.txt
	@.venv-lowest/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	@.venv-lowest/bin/python -m pip install --quiet --constraint .venv-lowest/floors.txt --group test -e .
	@touch $@

lint: $(INSTALLED) ## ruff: rules and formatting; import-linter: which room may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: $(INSTALLED) ## mypy; of scripts, that all they name is there
	$(BIN)/mypy
	MYPYPATH=benchmarks $(BIN)/mypy --disable-error-code=arg-type --disable-error-code=assignment --disable-error-code=misc \
	  --disable-error-code=operator --disable-error-code=return-value --disable-error-code=union-attr \
	  --disable-error-code=var-annotated benchmarks docs tutorials

format: $(INSTALLED) ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED) ## build the documentation into docs/_build/html
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

wheelhouse: $(INSTALLED) ## gather in wheelhouse/ what benchmarks/gpu.py needs without a network
	$(BIN)/python benchmarks/wheelhouse.py

rehearse: $(INSTALLED) ## run benchmarks/gpu.py with tiny sizes on the CPU, every part
	$(BIN)/python benchmarks/gpu.py --device cpu --rehearse --minutes 15 --out build/gpu

# The sections are not needed for it, so that it also runs where they are not.
bare: $(INSTALLED) ## rehearse the wheelhouse on a bare Python 3.12, if there is one
	$(BIN)/python benchmarks/wheelhouse.py --without-data --folder build/wheelhouse
	$(BIN)/python benchmarks/bare_install.py --wheelhouse build/wheelhouse

# Newest versions that go together, from pyproject.toml. Accelerator packages stay out: pip adds what
# the torch of each platform asks for.
lock: ## rewrite requirements.lock
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	build/lock/bin/python -m pip install --group test --group doc --group dev .
	build/lock/bin/python -m pip freeze --all \
	| sed -e 's/+.*//' -e '/^\(pip\|wheel\|triton\|nvidia-.*\|cuda-.*\|stpredict-.*\)\(==\| @ \)/d' > requirements.lock

clean: ## remove everything that was built, except the environments
	rm -rf build dist demo docs/_build docs/tutorials docs/generated docs/api/generated .coverage .coverage.* coverage.xml
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests tutorials benchmarks -name __pycache__ -type d -exec rm -rf {} +
