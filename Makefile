# make demo | test | lint | wheel | bench | performance | prefill | fuzz | sanitize | cuda-check | cuda-link-check | compile-check | gpu-check | clean
# TORCH="torch==…" puts another torch into .venv; STGP_NO_EXT=1 leaves the compiled kernels out.

PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' requirements.txt)
VENV := .venv
# one stamp for each torch asked for, and one for each way to build: naming another one installs again
stamp = $(shell printf '%s' '$(1)' | cksum | cut -d ' ' -f 1)
INSTALLED := $(VENV)/installed-$(call stamp,$(TORCH))
BUILT := $(VENV)/built-$(call stamp,$(TORCH) $(STGP_NO_EXT) $(CMAKE_ARGS) $(CXX))
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh tests/cpp/* tests/cuda_emulation/*)

.PHONY: demo test lint wheel bench performance prefill fuzz sanitize cuda-check cuda-link-check compile-check gpu-check clean
.DELETE_ON_ERROR:

demo: $(BUILT)
	$(VENV)/bin/stgp demo -o demo.png --force

test: $(BUILT)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto

lint: $(BUILT)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

# microbenchmarks for a comparison of two commits; `stgp bench` measures more, and is what documents are made from

bench: $(BUILT)
	$(VENV)/bin/python -m pytest benchmarks -q --benchmark-autosave --benchmark-storage=file://.benchmarks \
	    --benchmark-columns=median,iqr,min,rounds --benchmark-sort=min $(ARGS)

# what pooling saves a language model; docs/performance.md and its pictures from the results that are kept

prefill: $(BUILT)
	$(VENV)/bin/python -m benchmarks.prefill $(ARGS)

performance: $(BUILT)
	$(VENV)/bin/python -m benchmarks.performance $(ARGS)

# CPU kernels: 5 minutes of random calls, memory and threads under sanitizers

fuzz: $(BUILT)
	$(VENV)/bin/python -m tests.fuzz --seconds 300 $(ARGS)

sanitize: $(BUILT)
	$(VENV)/bin/python -m tests.sanitize $(ARGS)

# CUDA kernels: what nvcc makes of them; that they link with a CUDA build of torch, which is several GB

cuda-check: $(BUILT)
	$(VENV)/bin/python -m benchmarks.cuda_check $(ARGS)

CUDA_TORCH ?= torch==2.14.1
LINK_TOOLS := numpy|rich|markdown-it-py|mdurl|Pygments|safetensors|setuptools|cmake|ninja|pybind11|pytest|iniconfig|pluggy|packaging|hypothesis|sortedcontainers|exceptiongroup|tomli

cuda-link-check:
	$(PYTHON) -m venv build/cuda-link
	build/cuda-link/bin/pip install --quiet --disable-pip-version-check "$(CUDA_TORCH)"
	grep -E '^($(LINK_TOOLS))==' requirements.txt | build/cuda-link/bin/pip install --quiet --disable-pip-version-check --no-deps -r /dev/stdin
	build/cuda-link/bin/python -m tests.check_cuda_link $(ARGS)

# a wheel with the compiled kernels, built from the sdist, and a check of it in an environment without compiler

wheel: $(INSTALLED)
	rm -rf dist
	$(VENV)/bin/python -c "from setuptools.build_meta import build_sdist; build_sdist('dist')"
	$(VENV)/bin/python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist dist/*.tar.gz
	$(VENV)/bin/python -m tests.check_wheel dist/*.whl --torch "$(TORCH)"

# what the Triton kernels compile to with the oldest Triton that is supported; `make test` asks the pinned one
compile-check: $(BUILT)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/oldest-triton triton==3.6.0
	PYTHONPATH=build/oldest-triton $(VENV)/bin/python -m pytest tests/test_compile_report.py

# with the Python that has torch for the GPU, as it is: a checkout needs no installation
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(ARGS)

$(INSTALLED): requirements.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("stgridpool_kernels needs Python 3.10 or newer, found " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check "$(TORCH)"
	grep -v '^torch==' requirements.txt | $(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -r /dev/stdin
	rm -f $(VENV)/installed-* $(VENV)/built-*
	touch $@

# what is there is removed first: with STGP_NO_EXT=1 nothing takes its place
$(BUILT): $(INSTALLED) pyproject.toml setup.py CMakeLists.txt $(CPP)
	rm -f stgridpool_kernels/_C*.so
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	rm -f $(VENV)/built-*
	touch $@

clean:
	rm -rf $(VENV) .benchmarks build dist *.egg-info stgridpool_kernels/_C*.so demo.png
