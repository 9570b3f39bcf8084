# make train   sets up and runs the main job on this machine's CPU
# make test    sets up and passes the tests
# make test-nemo-1   trains with NeMo 1's program too (Python 3.11)

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: train test test-nemo-1 lint setup clean

train: $(STAMP)
	$(BIN)/python train.py

test: $(STAMP) lint
	$(BIN)/python -m pytest

# NeMo 2.0.0, of the container that entrypoint=nemo_24_09 runs in, in an environment of its own.
test-nemo-1: $(STAMP) build/nemo-1/.complete
	NEMO_BENCH_NEMO_1=$(CURDIR)/build/nemo-1/bin/python $(BIN)/python -m pytest tests/integration/test_nemo_24_09.py

build/nemo-1/.complete: tests/nemo_24_09/environment.sh tests/nemo_24_09/requirements.txt
	tests/nemo_24_09/environment.sh build/nemo-1 $(PYTHON)
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(STAMP)

# torch goes first and alone: a range in another package's needs could bring a second, larger build of it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else f"Python 3.11 or 3.12 is needed, and {sys.executable} is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)")'
	@echo 'Setting up $(VENV): torch, NeMo and Megatron take some minutes to install.'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) outputs build *.egg-info .mypy_cache .ruff_cache .pytest_cache
