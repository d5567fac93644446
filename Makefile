# Entry to everything a developer does here. `make` shows what there is.

PYTHON_IN := .venv/bin/python
TESTARGS ?=
BENCHARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup proto demo test test-long check check-style check-types check-imports bench bench-tools clean

help:  ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  TESTARGS go to pytest:          make test TESTARGS=tests/store"
	@echo "  BENCHARGS go to the benchmark:  make bench BENCHARGS=--help"

setup:  ## install what is missing, make .venv (does nothing if nothing changed)
	@config/setup.sh

proto: setup  ## make tools/reapi/generated anew from tools/reapi/proto
	$(PYTHON_IN) -m tools.reapi.generate

demo: setup  ## see casfs at work, in a minute
	$(PYTHON_IN) -m tools.demo

test: setup  ## run the default tests
	$(PYTHON_IN) -m pytest -n 3 $(TESTARGS)

test-long: bench-tools  ## run the tests that take longer
	$(PYTHON_IN) -m pytest -m long $(TESTARGS)

check: check-style check-types check-imports  ## lint, formatting, types, import rules (-k: don't stop at the first)

check-style: setup
	$(PYTHON_IN) -m ruff check .
	$(PYTHON_IN) -m ruff format --check .

check-types: setup
	$(PYTHON_IN) -m mypy

check-imports: setup
	$(PYTHON_IN) -m pytest -q tests/test_imports.py

bench-tools: setup  ## make what the benchmarks compare to and are driven by (Go programs, into .venv/bin)
	@config/bench-tools.sh

bench: bench-tools  ## measure
	$(PYTHON_IN) -m tools.bench $(BENCHARGS)

clean:  ## remove .venv, caches and build results
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
