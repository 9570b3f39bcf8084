# make train   sets up and runs the main job on this machine's CPU
# make test    sets up and passes the tests
# make test-fast     the checks of every commit: lint, the unit tests, one training run
# make test-nemo-1   trains with NeMo 1's program too (Python 3.11)
# make test-stacks   trains with every pair of NeMo or Megatron-Bridge and megatron-core that pip has

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: train test test-slurm test-others test-fast test-nemo-1 test-stacks light lint setup clean

train: $(STAMP)
	$(BIN)/python train.py
	@echo '`source $(BIN)/activate` gives you this environment for the other commands of the README.'

# Slurm's tests mostly wait: they run beside the others, and are shown behind them.
test: $(STAMP) build/light/.complete build/bridge/.complete build/bridge_0_6/.complete lint
	@$(MAKE) --no-print-directory --jobs=2 --keep-going test-slurm test-others; \
	status=$$?; cat build/test-slurm.log; exit $$status

test-slurm:
	@$(BIN)/python -m pytest tests/slurm >build/test-slurm.log 2>&1

test-others:
	$(BIN)/python -m pytest --ignore=tests/slurm

test-fast: $(STAMP) lint
	$(BIN)/python -m pytest tests/unit tests/integration/test_bare_run.py

# NeMo 2.0.0, of the container that entrypoint=nemo_24_09 runs in, in an environment of its own.
test-nemo-1: $(STAMP) build/nemo-1/.complete
	NEMO_BENCH_NEMO_1=$(CURDIR)/build/nemo-1/bin/python $(BIN)/python -m pytest tests/integration/test_nemo_24_09.py \
		tests/slurm/test_containers.py::test_nemo_1s_program_runs_at_its_path_in_the_image

build/nemo-1/.complete: tests/nemo_24_09/environment.sh tests/nemo_24_09/requirements.txt
	tests/nemo_24_09/environment.sh build/nemo-1 $(PYTHON)
	touch $@

# Megatron-Bridge, in the newest release for Python 3.11, as an overlay on this environment.
build/bridge/.complete: Makefile
	rm -rf build/bridge
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target build/bridge \
		megatron-bridge==0.3.0 megatron-core==0.16.0 six==1.17.0
	touch $@

# Bridge 0.6, which holds NVIDIA's performance recipes: they are built and compared, never run, and so Python 3.11 will do.
build/bridge_0_6/.complete: Makefile
	rm -rf build/bridge_0_6
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python --target build/bridge_0_6 \
		megatron-bridge==0.6.2 megatron-core==0.19.2 transformers==5.12.1 huggingface_hub==1.33.0
	touch $@

# PYTHON312=/path/to/python3.12 for Bridge 0.4 and later: its torch takes 5 GB.
test-stacks: $(STAMP) $(if $(PYTHON312),build/python312/.complete)
	PYTHON=$(BIN)/python $(if $(PYTHON312),PYTHON312=build/python312/bin/python) tests/stacks.sh build/stacks

build/python312/.complete: Makefile pyproject.toml constraints.txt
	$(PYTHON312) -m venv build/python312
	build/python312/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	build/python312/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e . \
		transformers peft accelerate datasets einops tensorboard wandb nvidia-modelopt nvidia-resiliency-ext
	touch $@

# What a login node needs: no torch, no NeMo. A test checks points, prepares data and reports with it.
light: build/light/.complete

build/light/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv build/light
	build/light/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(STAMP)

# torch goes first and alone: a range in another package's needs could bring a second, larger build of it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else f"Python 3.11 or 3.12 is needed, and {sys.executable} is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)")'
	@echo 'Setting up $(VENV): installing torch (up to some minutes) ...'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	@echo 'Setting up $(VENV): installing NeMo and Megatron (1 to 5 minutes) ...'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) outputs build *.egg-info .mypy_cache .ruff_cache .pytest_cache
