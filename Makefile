PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_OUTPUT := demo-output
DEMO_TEXT := --windows 8 --window-length 1024

DEMO_METHODS := ghost magnitude random output+repair output+refit50+repair balanced+per-layer

# A test worker per core, each on one thread; four at the most, for they take a gigabyte each.
WORKERS := --numprocesses logical --maxprocesses 4 --dist worksteal
TYPES := build/mypy.txt

.PHONY: demo test lint style docs clean

demo: $(VENV)/installed
	@echo "Six methods prune the built-in model to two state sizes. It takes one to three minutes; the time left is told on the way."
	$(BIN)/ghostssm compare reference --state-size 64 32 --text-windows 24 $(DEMO_TEXT) --methods $(DEMO_METHODS)
	$(BIN)/ghostssm prune reference --state-size 32 --refit 0 $(DEMO_TEXT) --output $(DEMO_OUTPUT) --overwrite
	@echo
	@echo "Next:"
	@echo "  $(BIN)/ghostssm generate $(DEMO_OUTPUT) --prompt 'def main(' --max-new-tokens 64    # let it write"
	@echo "  $(BIN)/ghostssm report $(DEMO_OUTPUT)                       # a page with figures of what was pruned"
	@echo "  $(BIN)/ghostssm inspect YOUR_MODEL --state-size 64         # your own model: a folder or a hub id"
	@echo "  $(BIN)/ghostssm prune YOUR_MODEL --state-size 64 --windows 16 --output smaller"

# mypy works beside the tests. What it finds comes after their summary; where it finds nothing, that is the last line.
test: style
	@mkdir -p $(dir $(TYPES))
	$(BIN)/mypy >$(TYPES) 2>&1 & mypy=$$!; \
	$(BIN)/python -m pytest $(WORKERS); tests=$$?; \
	wait $$mypy || { cat $(TYPES); exit 1; }; \
	exit $$tests

lint: style
	$(BIN)/mypy

style: $(VENV)/installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports

docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(DEMO_OUTPUT) build dist site
