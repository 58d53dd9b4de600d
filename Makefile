# make demo: the main job on the embedded default.   make test: the tests.   make docs: the site.
# Each makes the environment in .venv when it is missing or out of date, then does its one job.
#
# Another Python:          make demo PYTHON=python3.12
# Another build of torch:  make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Newer packages:          make lock UPGRADE=--upgrade      (or '--upgrade-package transformers')

PYTHON ?= python3
TORCH_INDEX ?=
UPGRADE ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOCK := requirements.lock
LOCKER := build/lock

.PHONY: demo test lint docs lock clean

demo: $(INSTALLED)
	$(BIN)/fusellm demo

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --doctest-modules src/fusellm

# As strict as Sphinx is: a link that leads nowhere, or a page in no table of contents, fails.
docs: $(INSTALLED)
	$(BIN)/sphinx-build -W --keep-going -n --fresh-env --quiet docs build/site
	@echo "the documentation: build/site/index.html"

# The lock first: of torch's own packages only those that belong to its build are then left to pip.
$(INSTALLED): pyproject.toml constraints.txt $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "fusellm needs Python 3.11 or later, and $(PYTHON) is " + sys.version.split()[0] + "; run: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --require-hashes --no-deps --requirement $(LOCK)
	$(BIN)/pip install --quiet --constraint constraints.txt $(addprefix --index-url ,$(TORCH_INDEX)) torch
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/pip check
	@touch $(INSTALLED)

# What the lock leaves out: torch, and what only some of its builds need.
CUDA := cuda-bindings cuda-pathfinder cuda-toolkit triton $(addprefix nvidia-,cublas cuda-cupti \
	cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 \
	nccl-cu13 nvjitlink nvshmem-cu13 nvtx)

# Pins that pyproject.toml still allows are kept.
lock:
	$(PYTHON) -m venv $(LOCKER)
	$(LOCKER)/bin/pip install --quiet uv==0.13.9
	$(LOCKER)/bin/uv pip compile pyproject.toml --output-file $(LOCK) --extra dev --constraint constraints.txt \
		--universal --python-version 3.11 --fork-strategy fewest --generate-hashes --no-annotate --quiet \
		--custom-compile-command 'make lock' $(UPGRADE) $(addprefix --no-emit-package=,torch $(CUDA))

clean:
	rm -rf $(VENV) $(LOCKER) build/site
