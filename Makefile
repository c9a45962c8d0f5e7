# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make the environment first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Spin-waiting OpenMP threads cost 4-8x on a shared two-core machine.
export OMP_WAIT_POLICY ?= passive

# One thread a worker: as many workers as cores (four at most: each holds about 1 GB).
TEST_JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(4, os.cpu_count() or 1))')

.PHONY: demo test lint style types pytest docs tables serve-test clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

demo: $(STAMP)
	$(BIN)/holdfast demo --out runs/demo

lint: style types

style: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/lint-imports
	$(BIN)/mypy

pytest: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_JOBS) --dist worksteal

# The type checker uses one core: what is left of the other is for the first tests.
test: style
	@$(MAKE) --no-print-directory -j 2 types pytest

# A real vLLM on the CPU, in an environment of its own (3.5 GB); a quarter of an hour on two cores. Not part of `make test`.
SERVE_VENV ?= .venv-vllm
$(SERVE_VENV)/.installed: tests/serve_vllm/make_environment.sh tests/serve_vllm/stub_torchvision.py
	PYTHON=$(PYTHON) bash tests/serve_vllm/make_environment.sh $(SERVE_VENV)
	@touch $@

serve-test: $(STAMP) $(SERVE_VENV)/.installed
	HOLDFAST_VLLM_PYTHON=$(abspath $(SERVE_VENV))/bin/python $(BIN)/python -m pytest -s tests/serve_vllm

# The pages, in build/site; `mkdocs serve` shows them while you write.
docs: $(STAMP)
	$(BIN)/mkdocs build --strict

# Every table of docs/REPRODUCTION.md from nothing: days on two cores, goes on where it was stopped. Some of them:
# `make tables TABLES="rivals order --seeds 0 --prompts 100"`; what there is: `make tables TABLES=--list`.
tables: $(STAMP)
	$(BIN)/python benchmarks/tables.py $(TABLES)

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
