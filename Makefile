# Everything a fresh machine needs: python3 with venv, and make. Set PYTHON to use another interpreter.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test soak lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## create .venv with the package and its development tools

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(STAMP) ## adapt a model to photos it has not seen, at three sizes, in about a minute: models and a report in demo/
	$(BIN)/kinprune adapt starter/photos --bank starter/bank.db --neighbours 4 --sizes 0.5,0.2,0.1 --steps 30 --out demo --overwrite

test: $(STAMP) ## run the tests (ARGS="tests/unit -k name" for some of them)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 $(ARGS)

soak: $(STAMP) ## kill builders, servers and machines at random for minutes (KINPRUNE_SOAK_SECONDS each), and check the bank
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/soak $(ARGS)

lint: $(STAMP) ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src

format: $(STAMP) ## format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and all that was built
	rm -rf $(VENV) build demo dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
