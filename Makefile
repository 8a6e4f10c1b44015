# Every target sets up what it needs: python3 with venv and pip is all that must be there.
PYTHON ?= python3
VENV   ?= .venv
# the versions that are installed: constraints-oldest.txt has the lowest that are supported
CONSTRAINTS ?= constraints.txt
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
OUT    ?= demo
DIST   ?= dist
TINY   := .cache/tiny-sd1
PREFIX ?= /usr/local
# processes that run the tests; a file of tests stays in one
JOBS   ?= 2
# C and C++; abi1 is the header of the first release, which never changes
C_FILES = $(shell find benchmarks examples runtime/capi tests/capi -name abi1 -prune -o -name '*.[ch]' -print -o -name '*.[ch]pp' -print)
PYTEST  = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
GPU_VENV   := .venv-gpu
GPU_PYTHON := $(GPU_VENV)/bin/python
GPU_INSTALL = $(GPU_PYTHON) -m pip install --quiet --disable-pip-version-check
GPU_READY  := $(if $(filter file,$(origin GPU_PYTHON)),$(GPU_VENV)/.ready)
GATE        = $(PYTHON) benchmarks/gpu/gate.py $(MAKE) --no-print-directory
# PYTHON=… of `make engines` is an interpreter for the engines; the environment is made with python3 then
BASE   := $(if $(filter engines,$(MAKECMDGOALS)),python3,$(PYTHON))

.PHONY: help demo engines test test-quick test-full check format dist golden bench real-check clean
.PHONY: capi install-capi
.PHONY: gpu-test gpu-test-here gpu-bench gpu-bench-here gpu-report gpu-report-here
.DEFAULT_GOAL := help

help:
	@sed -n 's/^## //p' Makefile

# The environment is rebuilt only when its inputs change.
$(READY): $(CONSTRAINTS) pyproject.toml runtime/pyproject.toml
	@echo "== environment: $(VENV), from $(CONSTRAINTS) (some minutes the first time)"
	@test -x $(BIN)/python || $(BASE) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) \
		--editable './runtime[onnxruntime]' --editable '.[test,check]'
	@touch $@

## make demo        export the shapes example to a bundle and generate a sheet of images with it
demo: $(READY)
	@echo "== export: examples/shapes/checkpoint -> $(OUT)/shapes"
	@$(BIN)/sdexport build examples/shapes/checkpoint --output $(OUT)/shapes --backend onnxruntime
	@echo "== images: $(OUT)/sheet.png"
	@$(BIN)/python examples/shapes/sheet.py $(OUT)/shapes -o $(OUT)/sheet.png
	@echo "== done: look at $(OUT)/sheet.png, then generate your own:"
	@echo "   $(BIN)/sdruntime generate $(OUT)/shapes \"a large green square on the right on a white background\" --guidance 2 -o $(OUT)/mine.png"

## make engines     every recipe of engines/ built for this machine: RECIPE=sd15 for one, MODEL=path with another checkpoint,
##                  PYTHON=/usr/bin/python3 with an interpreter that sees the system's TensorRT
engines: $(READY) $(if $(filter-out tiny,$(RECIPE)),,$(TINY))
	@$(BIN)/sdexport engines $(RECIPE) $(if $(MODEL),--model "$(MODEL)") \
		$(if $(filter command,$(origin PYTHON)),--python "$(PYTHON)") $(ARGS)

$(TINY): | $(READY)
	@echo "== a tiny checkpoint of random weights: $@"
	@$(BIN)/python tests/tiny.py $@

## make test        the test suite, in JOBS=2 processes (ARGS="-x tests/runtime" and the like go to pytest)
test: $(READY)
	@echo "== tests"
	@$(PYTEST) -m "not full and not gpu" $(ARGS)

## make test-quick  the runtime's own tests, without what compiles or exports: under two minutes
test-quick: $(READY)
	@echo "== tests of the runtime"
	@$(PYTEST) -q -m "not full and not gpu and not slow" tests/runtime tests/test_house.py tests/test_layers.py $(ARGS)

## make test-full   the test suite and its wide matrices
test-full: $(READY)
	@echo "== tests, wide matrices included"
	@$(PYTEST) -m "not gpu" $(ARGS)

## make gpu-test    what only an NVIDIA GPU can show, with every backend that loads: REQUIRE=tensorrt,tensorrt-rtx,onnxruntime makes
##                  the absence of one a failure; without a GPU it fails, unless ALLOW_NO_GPU=1
gpu-test:
	@$(GATE) gpu-test-here
gpu-test-here: $(GPU_READY)
	@GPU_TEST_JSON=.cache/gpu/gpu-test.json $(GPU_PYTHON) -m pytest -m gpu tests/integration $(ARGS)

## make gpu-bench   latencies on an NVIDIA GPU beside diffusers, as tables and JSON (ARGS="--models sd15 --minutes 30")
gpu-bench:
	@$(GATE) gpu-bench-here
gpu-bench-here: $(GPU_READY)
	@$(GPU_PYTHON) -m benchmarks.gpu.bench $(ARGS)

## make gpu-report  both in short, as reports/GPU-LIBRARY.json, to be read and sent
gpu-report:
	@$(GATE) gpu-report-here
gpu-report-here: $(GPU_READY)
	@$(GPU_PYTHON) -m benchmarks.gpu.report $(ARGS)

# An environment of its own, since onnxruntime-gpu and onnxruntime have the same files. GPU_PYTHON=… takes an interpreter that has
# what is needed already: one that sees a Jetson's TensorRT, or a machine without a network.
$(GPU_VENV)/.ready: constraints.txt pyproject.toml runtime/pyproject.toml
	@echo "== environment: $(GPU_VENV), from constraints.txt, with onnxruntime-gpu and what of TensorRT this platform has"
	@test -x $(GPU_PYTHON) || $(PYTHON) -m venv $(GPU_VENV)
	@$(GPU_INSTALL) --constraint constraints.txt --editable ./runtime --editable '.[test]'
	@$(GPU_PYTHON) -m pip uninstall --quiet --yes onnxruntime
	@$(GPU_INSTALL) --force-reinstall --no-deps onnxruntime-gpu
	@for library in tensorrt tensorrt-rtx; do $(GPU_INSTALL) $$library || echo "== $$library: not for this platform"; done
	@touch $@

## make capi        the C library, built into build/capi; for C and C++ programs (docs/embedding.md)
capi:
	@command -v cmake >/dev/null || { echo "make capi needs CMake and a C++17 compiler: sudo apt-get install cmake g++" >&2; exit 3; }
	@cmake -S runtime/capi -B build/capi $(ARGS)
	@cmake --build build/capi --parallel

## make install-capi  the same, installed with its headers: PREFIX=/usr/local where nothing else is said
install-capi: capi
	@cmake --install build/capi --prefix "$(abspath $(PREFIX))"

## make check       ruff, clang-format, and strict mypy for the oldest and the newest Python
check: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run -Werror $(C_FILES)
	@$(MAKE) --no-print-directory -j 2 types-3.10 types-3.13
types-%: $(READY)
	@$(BIN)/mypy --python-version $*

## make format      every file of Python, C and C++ as `make check` wants it
format: $(READY)
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	@$(BIN)/clang-format -i $(C_FILES)

## make dist        wheels and source archives of both packages in DIST=dist, checked
dist: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) build twine
	@rm -rf $(DIST) && mkdir -p $(DIST)
	@for package in runtime .; do $(BIN)/python -m build --outdir $(DIST) $$package > $(DIST)/log || { cat $(DIST)/log; exit 1; }; done
	@rm -f $(DIST)/log
	@$(BIN)/python -m twine check --strict $(DIST)/*

## make golden      the tests' golden tables, read from diffusers and torch again
golden: $(READY)
	@for script in tests/golden/make*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

## make bench       the benchmarks (full-size random checkpoints: a quarter of an hour and 11 GB of disk)
bench: demo
	@echo "== benchmarks"
	@$(BIN)/python benchmarks/overhead.py $(OUT)/shapes --output benchmarks/results/overhead.json
	@$(BIN)/sdexport bench $(OUT)/shapes --guidance 2 --against torch --model examples/shapes/checkpoint \
		--markdown $(OUT)/bench.md --picture $(OUT)/bench.svg
	@$(BIN)/python benchmarks/export_full_size.py sd15 --json benchmarks/results/export-sd15.json
	@$(BIN)/python benchmarks/export_full_size.py sdxl --ours-only --json benchmarks/results/export-sdxl.json

## make real-check  MODEL=path: build and verify real weights, and compare images with diffusers; adds a row to reports/
real-check: $(READY)
	@test -n "$(MODEL)" || { echo "make real-check MODEL=path: a diffusers folder or a hub id" >&2; exit 2; }
	@$(BIN)/python -m benchmarks.real_check "$(MODEL)" $(ARGS)

## make clean       everything that make made
clean:
	rm -rf $(VENV) .venv-* build demo dist engines/built $(TINY) .cache/gpu .cache/real-check .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
