# Everything runs in .venv; the first call of any target builds it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: all check docs format test fixtures demo smoke clean
all: check test

$(STAMP): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

check: $(STAMP)  ## format, lint and types; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python scripts/recipe_table.py --check || { echo "README's table of models is stale: make docs"; exit 1; }

docs: $(STAMP)  ## the README's table of models, from configs/
	$(BIN)/python scripts/recipe_table.py

format: $(STAMP)  ## rewrite to the house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

fixtures: $(STAMP)  ## real checkpoints for tests and demo, built once under .cache/
	$(BIN)/python scripts/make_fixtures.py

test: $(STAMP) fixtures
	$(BIN)/python -m pytest

demo: $(STAMP) fixtures  ## the main job on real weights
	bash scripts/demo.sh $(BIN)

smoke: $(STAMP)  ## the built wheel alone, with runtime dependencies only
	bash scripts/smoke.sh $(PYTHON)

clean:
	rm -rf $(VENV) .cache dist build out
