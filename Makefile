# make setup   a virtual environment in .venv with everything, pinned by constraints.txt
# make demo    set-up, then a mesh from a sample image with the embedded model
# make test    set-up, then the tests
# make lint    set-up, then ruff and mypy
#
# PYTHON=python3.12 chooses the interpreter. On a machine without a GPU, the smaller CPU build of torch comes with
# TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Two processes, one file of tests at a time in each: a test uses one thread.
PYTEST_ARGS ?= -n 2 --dist loadfile
DEMO_IMAGE ?= load/images/robot.png

.PHONY: setup demo test lint clean
.DELETE_ON_ERROR:

setup: $(STAMP)

demo: setup
	$(BIN)/python launch.py --config configs/nvsadapter.yaml --train name=demo data.image_path=$(DEMO_IMAGE)

test: setup
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info

# The stamp holds what was installed: it is remade when the interpreter's folder is gone or these files change.
$(STAMP): pyproject.toml setup.py constraints.txt
	@command -v git >/dev/null || { echo "error: git is missing; install it (Debian: apt install git)" >&2; exit 2; }
	@command -v $(PYTHON) >/dev/null || \
	  { echo "error: $(PYTHON) is missing; install it (Debian: apt install python3 python3-venv)" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; choose one with make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) cannot make environments; install venv (Debian: apt install python3-venv)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(PIP) setuptools
	@$(PIP) torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $(STAMP)
