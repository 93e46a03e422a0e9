PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_OUTPUT := demo-output
DEMO_TEXT := --windows 8 --window-length 1024

DEMO_METHODS := ghost magnitude random output+repair output+refit50+repair balanced+per-layer

.PHONY: demo test lint docs clean

demo: $(VENV)/installed
	$(BIN)/ghostssm compare reference --state-size 64 32 --calibration stdlib --text stdlib --text-windows 24 $(DEMO_TEXT) --methods $(DEMO_METHODS)
	$(BIN)/ghostssm prune reference --state-size 32 --calibration stdlib $(DEMO_TEXT) --output $(DEMO_OUTPUT) --overwrite

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(DEMO_OUTPUT) build dist site
