# make demo   from a fresh clone: virtual environment, pinned install, the whole method on the embedded model
# make venv   the environment alone     make dev     with the development tools
# make test   the test suite            make check   ruff and mypy            make clean   remove what these made
# make chaos  every fault on a simulated cluster of three nodes, as a table
# make matrix the suite with the lowest and the newest transformers allowed, for a release (TESTS=tests/moe for some)
# make bench-gpu  the figures of a GPU, in one command; needs torch and transformers, not Ray, MLflow or FAISS
# make fuzz   100,000 damaged files through every reader (INPUTS=... for another number)
#
# Needs Python 3.11 or newer with its venv module, pip, and nothing else. Settings, all on the command line:
#   make venv PYTHON=python3.12                      another interpreter
#   make venv TORCH="torch==2.13.0 --index-url URL"  torch's build for your GPU (pytorch.org names the URL)
#   make venv VENV_FLAGS=--system-site-packages      keep the torch of a CUDA or ROCm image
#   make venv EXTRAS=minilm,hub                      without FAISS (torch then searches, to the same answer)

PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
EXTRAS ?= minilm,faiss,hub,search,objects
# Two suffice: the tests that use Ray run one after another in one of them.
TEST_WORKERS ?= 2
# Installed only where torch cannot be imported: a build that is already there is kept.
TORCH ?= torch==2.13.0

INPUTS ?= 100000
# Of `make matrix`: which tests, and which versions of transformers (default: the lowest and the newest that are allowed).
TESTS ?=
MATRIX ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(EXTRAS)
# With the development tools: what the checks and the tests need, and nobody who only runs roma-ray.
DEVELOPED := $(VENV)/.installed-$(EXTRAS),dev
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help venv dev demo test matrix fuzz chaos check bench bench-gpu format pin clean

help:
	@awk '!/^#/ {exit} {sub(/^# ?/, ""); print}' $(firstword $(MAKEFILE_LIST))

venv: $(INSTALLED)

dev: $(DEVELOPED)

# The stamp is written last, so an interrupted install is taken up again. Not with pip's --no-compile: where
# PYTHONDONTWRITEBYTECODE is set, as in many containers, every process would compile its imports: twelve seconds more.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "roma-ray needs Python 3.11 or newer; $(PYTHON) is not. Try: make $(or $(MAKECMDGOALS),venv) PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV) || \
	  { echo "$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2; rm -rf $(VENV); exit 1; }
	@$(BIN)/python -c 'import torch' 2>/dev/null || { $(PIP) install --constraint constraints.txt $(TORCH); }
	@echo "installing roma-ray[$*] with the versions of constraints.txt: a few minutes and about 2.8 GB"
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@

demo: venv
	$(BIN)/roma-ray run

test: dev
	$(BIN)/python -m pytest -n $(TEST_WORKERS)

# What a release needs beside `make check test`: the versions of transformers at both ends of pyproject.toml's bounds.
matrix: dev
	@BASE=$(VENV) TEST_WORKERS=$(TEST_WORKERS) TESTS="$(TESTS)" MATRIX="$(MATRIX)" .ci/matrix

fuzz: dev
	$(BIN)/python -m tests.fuzzing --inputs $(INPUTS)

# The faults of storage mount file systems in memory, so they need root.
chaos: dev
	$(BIN)/python -m tests.chaos

check: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The gates of speed and memory, half an hour and 14 GB of disk; exit code 1 when a floor is missed.
BENCHMARKS ?= engine extract scale memory trials
bench: venv
	@missed=0; for name in $(BENCHMARKS); do \
	  echo "== $$name"; $(BIN)/python benchmarks/$$name.py --json bench-$$name.json || missed=1; \
	done; exit $$missed

# Installs nothing: a GPU image's own interpreter serves where there is no environment here (PYTHON=... names another).
GPU_OPTIONS ?=
bench-gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu.py --json bench-gpu.json $(GPU_OPTIONS)

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Keep the leading comment, replace the versions. Parts of a GPU's torch build are the machine's own business.
pin: dev
	@sed -n '/^#/p' constraints.txt > constraints.new
	@$(PIP) freeze --exclude-editable | grep -Ev '^(torch|triton|nvidia-|pytorch-triton|-e |pip|setuptools)' >> constraints.new
	@mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) .venv-matrix build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
