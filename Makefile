# Needs Python 3.11+ and pip. `make serve` and `make test` install what they need into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The CPU build of PyTorch lives on PyTorch's own index; the registry's build brings gigabytes of CUDA.
# For CUDA: make install TORCH_INDEX=https://download.pytorch.org/whl/cu130
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ARGS ?=

.PHONY: install serve test check bench format

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock requirements-dev.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --no-deps --extra-index-url $(TORCH_INDEX) $$(grep ^torch== requirements.lock)
	$(BIN)/pip install --disable-pip-version-check -r requirements-dev.lock
	$(BIN)/pip install --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

serve: install
	$(BIN)/slicewise serve $(ARGS)

test: install
	$(BIN)/python -m pytest $(ARGS)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest $(ARGS)

# make bench ARGS="--cifar TEST.zip --out runs/bench"
bench: install
	$(BIN)/slicewise-load bench $(ARGS)

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
