# make demo       quantize the demo model and let it write; a CPU is enough
# make test       set up what the tests need and run them all
# make gpu-test   the tests that need an NVIDIA GPU
# make gpu-tables the tables and pictures of the documents, measured on the GPU at hand, into TABLES
#
# PYTHON picks the interpreter (3.11 or later). Where there is an NVIDIA driver, JAX comes with CUDA 12; CUDA=cuda13
# takes CUDA 13 instead, CUDA= none.

PYTHON ?= python3
VENV ?= .venv
TABLES ?= tables
CUDA ?= $(if $(shell command -v nvidia-smi),cuda12)
comma := ,

BIN = $(VENV)/bin
BENCH = $(BIN)/marlin-jax bench
# Keeps what the demo compiled, so that its second run starts at once.
CACHED = JAX_COMPILATION_CACHE_DIR=$(VENV)/jax-cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

.PHONY: demo test gpu-test gpu-tables lint clean

demo: $(VENV)/.installed
	@$(CACHED) $(BIN)/marlin-jax demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto

gpu-test: $(VENV)/.installed-test
	$(BIN)/python -c "import jax; assert jax.default_backend() == 'gpu', 'no NVIDIA GPU here'"
	$(BIN)/python -m pytest -m gpu --junitxml=$(VENV)/gpu-tests.xml
	$(BIN)/python tests/gpu_table.py $(VENV)/gpu-tests.xml

# Qwen2.5-32B twice: what is measured behind 2:4 weights in one process was slower (docs/decode.md).
gpu-tables: $(VENV)/.installed-test
	mkdir -p $(TABLES)
	$(BENCH) matmul --sparse24 --output $(TABLES)/matmul.csv
	$(BENCH) plot $(TABLES)/matmul.csv $(TABLES)/speedup.png
	$(BENCH) plot $(TABLES)/matmul.csv $(TABLES)/roofline.png --kind roofline
	$(BENCH) matmul --shapes 135168x33792 --batches 1 16 64 --output $(TABLES)/layers.csv
	$(BENCH) matmul --model llama-3-8b --batches 16 --output $(TABLES)/layers.csv
	$(BENCH) matmul --model llama-3-70b --batches 16 --output $(TABLES)/layers.csv
	$(BENCH) matmul --model qwen2.5-32b --batches 16 --output $(TABLES)/layers.csv
	$(BENCH) matmul --shapes paper-7b paper-13b paper-33b paper-65b paper-falcon-180b --batches 16 --output $(TABLES)/layers.csv
	$(BENCH) model llama-3-8b --sparse24 --quantize-head --batches 1 16 64 128 --output $(TABLES)/model.csv
	$(BENCH) model llama-3-8b --batches 1 --prompt-tokens 2048 --new-tokens 16 --output $(TABLES)/model.csv
	$(BENCH) model qwen2.5-32b --sparse24 --quantize-head --batches 1 16 --output $(TABLES)/model.csv
	$(BENCH) model qwen2.5-32b --quantize-head --batches 1 16 64 --output $(TABLES)/model.csv
	$(BENCH) model llama-3-70b --weights 4-bit --batches 1 16 64 --output $(TABLES)/model.csv
	$(BENCH) serve llama-3-8b --seconds 22 --output $(TABLES)/serving.csv
	$(BENCH) serve llama-3-8b --weights 4-bit --rates --overload 480 --new-tokens 256 --output $(TABLES)/serving.csv
	$(BENCH) plot $(TABLES)/serving.csv $(TABLES)/serving.png --kind serve
	$(BENCH) quality --output $(TABLES)/quality.csv
	$(BENCH) plot $(TABLES)/quality.csv $(TABLES)/quality.png --kind quality

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
