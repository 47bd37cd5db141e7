# Everything here works on a fresh machine with Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
FUZZ_STAMP := $(VENV)/.installed-fuzz

.PHONY: demo test slow check trust bench docs clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)  ## train, attack, defend and report on synthetic faces
	$(BIN)/fedgc-priv demo

test: $(STAMP)  ## the tests, in minutes
	$(BIN)/python -m pytest

slow: $(STAMP)  ## the tests that take longer
	$(BIN)/python -m pytest -m slow

check: $(STAMP)  ## all that CI checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

$(FUZZ_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	touch $(FUZZ_STAMP)

trust: $(FUZZ_STAMP)  ## faults, hostile files, bad updates, planted mistakes: all of docs/trust.md, in less than an hour
	$(BIN)/python -m tests.trust

bench: $(STAMP)  ## speed, memory and exact resume; never part of the tests
	$(BIN)/python -m benchmarks.correction
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.private
	$(BIN)/python -m benchmarks.guarantee
	$(BIN)/python -m benchmarks.inversion
	$(BIN)/python -m benchmarks.resume --kills 12 --aimed 6

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $(DOCS_STAMP)

docs: $(DOCS_STAMP)  ## the documentation as a site: open site/index.html, or `python3 -m http.server -d site` for its search
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo site/index.html

clean:
	rm -rf $(VENV) build site *.egg-info
