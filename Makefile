# Every target works from nothing: the virtual environment is made when it is missing, and brought up
# to date when pyproject.toml or constraints.txt changed.
PYTHON ?= python3
VENV ?= .venv
# One pytest worker per core and at least two; each has one torch thread.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); \
	[ "$$n" -gt 2 ] && echo "$$n" || echo 2)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -q --no-input -c constraints.txt

# Keep compiled files of the tests and the package: the workers and the processes of the tests read
# them.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: all demo test test-second test-all lint gallery clean

all: test

# natten comes after torch, which its build imports. With a GPU in sight it would compile its CUDA
# library for an hour; the tests need its CPU path only, so the build is shown none.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e ".[test,timm]"
	NATTEN_CUDA_ARCH= CUDA_VISIBLE_DEVICES=-1 HIP_VISIBLE_DEVICES=-1 \
		$(INSTALL) --no-build-isolation --no-deps natten
	@touch $@

demo: $(STAMP)
	$(BIN)/python scripts/demo.py

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

# `python -m pytest` puts the root on the path, so that a folder which hides an installed package shows.
# The second tier has what takes long: kernels of every pattern, compiled pipelines, killed searches.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS)

test: lint
	$(PYTEST) -m "not slow and not second"

test-second: $(STAMP)
	$(PYTEST) -m second

test-all: test test-second

gallery: $(STAMP)
	$(BIN)/python scripts/draw_patterns.py

# Leaves the virtual environment.
clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
