# make demo       quantize the demo model and let it write; a CPU is enough
# make test       set up what the tests need and run them all
# make gpu-test   the tests that need an NVIDIA GPU
#
# PYTHON picks the interpreter (3.11 or later). Where there is an NVIDIA driver, JAX comes with CUDA 12; CUDA=cuda13
# takes CUDA 13 instead, CUDA= none.

PYTHON ?= python3
VENV ?= .venv
CUDA ?= $(if $(shell command -v nvidia-smi),cuda12)
comma := ,

BIN = $(VENV)/bin
# Keeps what the demo compiled, so that its second run starts at once.
CACHED = JAX_COMPILATION_CACHE_DIR=$(VENV)/jax-cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

.PHONY: demo test gpu-test lint clean

demo: $(VENV)/.installed
	@$(CACHED) $(BIN)/marlin-jax demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto

gpu-test: $(VENV)/.installed-test
	$(BIN)/python -c "import jax; assert jax.default_backend() == 'gpu', 'no NVIDIA GPU here'"
	$(BIN)/python -m pytest -m gpu --junitxml=$(VENV)/gpu-tests.xml
	$(BIN)/python tests/gpu_table.py $(VENV)/gpu-tests.xml

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.$(if $(CUDA),[$(CUDA)])'
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test$(if $(CUDA),$(comma)$(CUDA))]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev$(if $(CUDA),$(comma)$(CUDA))]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .hypothesis
