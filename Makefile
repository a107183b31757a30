# make demo     trains a ViTRM on handwritten digits, and draws what it learned
# make test     style, types, order of imports and tests, with the documentation's code and a strict build of it
# make proofs   the longer tests, marked slow: batteries of optimizers, attacks, old versions
# make oldest   tests with the oldest versions of libraries that pyproject.toml allows, in .oldest
# make docs     builds the documentation into site/; make docs-serve shows it while you write
# make bench    how fast the training loop is
# make campaign  kills runs, damages files and feeds in hostile ones: hours
# make recipes  writes recipes/paper and recipes/short
# Each works alone on a machine that has Python 3.11 or newer and make. ARGS reach the command.

# bytecode is kept whatever the environment says: without it, each process of a test compiles
# what it imports, and each worker rewrites the assertions of all tests
export PYTHONDONTWRITEBYTECODE :=

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test proofs oldest lint docs docs-serve bench campaign recipes clean

demo: $(INSTALLED)
	$(BIN)/smallfry train $(ARGS)

test: lint
	$(BIN)/pytest --numprocesses auto --maxprocesses 2 --dist worksteal -m "not slow" $(ARGS)

proofs: $(INSTALLED)
	$(BIN)/pytest --numprocesses auto --maxprocesses 2 --dist worksteal -m slow $(ARGS)

oldest: .oldest/installed
	.oldest/bin/python -m pytest -m "not slow" $(or $(ARGS),tests/runtime tests/data tests/deploy tests/training/test_checkpoint.py tests/training/test_resume.py)

.oldest/installed: pyproject.toml runtime/pyproject.toml tests/oldest.py
	$(PYTHON) -m venv .oldest
	$(PYTHON) tests/oldest.py > .oldest/constraints.txt
	.oldest/bin/python -m pip install --quiet --disable-pip-version-check --constraint .oldest/constraints.txt --editable ./runtime --editable '.[all]' pytest pytest-xdist hypothesis scipy markdown-it-py
	@touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2
	$(BIN)/lint-imports --no-cache

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build $(ARGS)

docs-serve: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve $(ARGS)

bench: $(INSTALLED)
	$(BIN)/python benchmarks/loop.py $(ARGS)

campaign: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m campaign $(ARGS)

recipes: $(INSTALLED)
	$(BIN)/python recipes/generate.py

$(INSTALLED): pyproject.toml runtime/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("smallfry needs Python 3.11 or newer, this is %d.%d; name another: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv .venv
	@echo "Installing smallfry and its libraries into .venv (PyTorch is large: some minutes)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ./runtime --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv .oldest site .mypy_cache .pytest_cache .ruff_cache .hypothesis .campaign
