# `make up` and `make test` install what they need on first use. Choose an interpreter with PYTHON=/path/to/python3.11.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install up down check test format clean distclean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Create .venv and install Baton with everything the tests need

$(STAMP): pyproject.toml constraints.txt deploy/install.sh
	@deploy/install.sh
	@touch $@

up: $(STAMP) ## Bring up router, one prefill and one decode worker on this machine; Ctrl-C stops them (UP_ARGS: options of `baton up`)
	@exec $(BIN)/baton up $(UP_ARGS)

down: $(STAMP) ## Stop the cluster that `make up` or `baton up --detach` started from this directory
	@$(BIN)/baton down

check: $(STAMP) ## Lint, format, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check ## The whole default suite (PYTEST_ARGS: extra options)
	$(BIN)/python -m pytest -ra $(PYTEST_ARGS)

format: $(STAMP) ## Rewrite the code as ruff wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove caches, built files and the local cluster's directory
	@! [ -x $(BIN)/baton ] || $(BIN)/baton down
	rm -rf .baton build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## Remove the virtual environment too
	rm -rf $(VENV)
