# Every target sets up what it needs: python3 with venv and pip is all that must be there.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
OUT    ?= demo

.PHONY: help demo test test-full check golden bench clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^## //p' Makefile

# The environment is made anew only when what it is made from changes.
$(READY): constraints.txt pyproject.toml runtime/pyproject.toml
	@echo "== environment: $(VENV), from constraints.txt (some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable './runtime[onnxruntime]' --editable '.[test,check]'
	@touch $@

## make demo        build the shapes example to a bundle and draw a sheet of pictures with it
demo: $(READY)
	@echo "== export: examples/shapes/checkpoint -> $(OUT)/shapes"
	@$(BIN)/sdexport build examples/shapes/checkpoint --output $(OUT)/shapes --backend onnxruntime
	@echo "== pictures: $(OUT)/sheet.png"
	@$(BIN)/python examples/shapes/sheet.py $(OUT)/shapes -o $(OUT)/sheet.png
	@echo "== done: look at $(OUT)/sheet.png, then ask for your own:"
	@echo "   $(BIN)/sdruntime generate $(OUT)/shapes \"a large green square on the right on a white background\" --guidance 2 -o $(OUT)/mine.png"

## make test        the test suite
test: $(READY)
	@echo "== tests"
	@$(BIN)/python -m pytest -m "not full and not gpu" $(ARGS)

## make test-full   the test suite and its wide matrices
test-full: $(READY)
	@echo "== tests, wide matrices included"
	@$(BIN)/python -m pytest -m "not gpu" $(ARGS)

## make check       ruff and strict mypy
check: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

## make golden      the golden numbers, read off diffusers and torch again
golden: $(READY)
	@for script in tests/golden/make*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

## make bench       the benchmarks (full-size random checkpoints: half an hour and 10 GB of disk)
bench: $(READY)
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

## make clean       everything that make made
clean:
	rm -rf $(VENV) .venv-* demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
