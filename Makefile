# Run `make` for help. Everything happens in .venv; it needs make, Python 3.11 or later and the package registries.

.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

# The first Python that is new enough and can make an environment; another one: make PYTHON=/path/to/python
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
	"$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help
help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: install
install: $(INSTALLED) ## Make .venv with everything in it (the targets below do so by themselves)

$(INSTALLED): pyproject.toml .ci/constraints.txt
	@[ -x $(BIN)/python ] || [ -n "$(PYTHON)" ] || { echo "make: no Python 3.11 or later with venv found; pass PYTHON=" >&2; exit 1; }
	@[ -x $(BIN)/python ] || { echo "Making .venv with $(PYTHON)"; "$(PYTHON)" -m venv .venv; }
	@echo "Installing into .venv (the first time takes a few minutes)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c .ci/constraints.txt -e ".[recipes,dev,docs,peft]"
	@touch $@

.PHONY: demo
demo: $(INSTALLED) ## Train the wide network with and without the guard and compare
	$(BIN)/lightning-conv compare --config wide_fc

# A worker per core, up to eight; a worker that is done takes half of what another one has left.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal --durations 10

.PHONY: test
test: $(INSTALLED) ## Run the tests, but for the slow ones, and of those with many cases every fourth case
	$(PYTEST) -m "not slow and not docs" --every 4

.PHONY: test-all
test-all: $(INSTALLED) ## Run the tests, the slow ones too
	$(PYTEST) -m "not docs"

.PHONY: test-ci
test-ci: $(INSTALLED) ## Run the tests, the slow ones too, and of those with many cases every third case
	$(PYTEST) -m "not docs" --every 3

.PHONY: lint
lint: $(INSTALLED) ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: format
format: $(INSTALLED) ## Format, and repair what can be repaired
	$(BIN)/ruff check --fix --exit-zero -q .
	$(BIN)/ruff format .

# Type checkers do not follow the mapping of the three rooms, so they get a tree of links in which it is spelled out.
.PHONY: typecheck
typecheck: $(INSTALLED) ## Check the types (mypy, strict)
	@rm -rf .typecheck/lightning_conv && mkdir -p .typecheck/lightning_conv
	@for path in lightning_conv/*; do ln -s "../../$$path" .typecheck/lightning_conv/; done
	@ln -s ../../callbacks ../../recipes .typecheck/lightning_conv/
	cd .typecheck && ../$(BIN)/mypy --config-file ../pyproject.toml -p lightning_conv

.PHONY: docs-check
docs-check: $(INSTALLED) ## Run the code blocks of the documentation
	$(BIN)/python -m pytest -m docs tests/house

# Without a network, and every warning is an error: a link that leads nowhere, a page that no table lists, a formula that cannot be converted.
.PHONY: docs
docs: $(INSTALLED) ## Build the site of the documentation in build/site and run its notebooks (two minutes; then half a minute)
	@SECONDS=0; $(BIN)/python -m sphinx -q -W --keep-going -b html -d build/doctrees docs build/site && echo "build/site/index.html, in $$SECONDS s"

.PHONY: screenshots
screenshots: $(INSTALLED) ## Take the pictures of the documentation with a headless browser (minutes; runs are kept in build/screenshots)
	$(BIN)/python docs/_screenshots

.PHONY: bench
bench: $(INSTALLED) ## Run the benchmarks (hours; the one against peers takes those that are there)
	@$(if $(wildcard benchmarks/*.py),,echo "There are no benchmarks yet.")
	@# A script is what has a main; the rest is imported by them.
	@for script in $$(grep -l '__main__' benchmarks/*.py); do echo "== $$script"; $(BIN)/python "$$script"; done

.PHONY: bench-peers
bench-peers: $(INSTALLED) ## Make .peers with the libraries that benchmarks and tests compare with
	$(BIN)/python benchmarks/peers/install.py

.PHONY: wheel-check
wheel-check: $(INSTALLED) ## Install the wheel into an empty environment and use it from there
	.ci/wheel-check $(BIN)/python

.PHONY: clean
clean: ## Remove what builds, checks and runs left behind (not .venv, .peers)
	rm -rf build dist *.egg-info .typecheck runs lightning_logs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find lightning_conv callbacks recipes tests -type d -name __pycache__ -prune -exec rm -rf {} +
