# make demo | test | lint | compile-check | gpu-check | clean. TORCH="torch==…" puts another torch into .venv.

PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' requirements.txt)
VENV := .venv
# one stamp for each torch asked for: naming another one installs again
STAMP := $(VENV)/installed-$(shell printf '%s' '$(TORCH)' | cksum | cut -d ' ' -f 1)

.PHONY: demo test lint compile-check gpu-check clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(VENV)/bin/stgp demo -o demo.png --force

test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# what the kernels compile to with the oldest Triton that is supported; `make test` asks the pinned one
compile-check: $(STAMP)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/oldest-triton triton==3.6.0
	PYTHONPATH=build/oldest-triton $(VENV)/bin/python -m pytest tests/test_compile_report.py

# with the Python that has torch for the GPU, as it is: a checkout needs no installation
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(ARGS)

$(STAMP): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("stgridpool_kernels needs Python 3.10 or newer, found " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check "$(TORCH)"
	grep -v '^torch==' requirements.txt | $(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -r /dev/stdin
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	rm -f $(VENV)/installed-*
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info demo.png
