# `make help` lists the targets. TORCH="torch==…" puts another torch into .venv; STGP_NO_EXT=1 leaves the compiled kernels out.

PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' requirements.txt)
VENV := .venv
# one stamp for each torch asked for, and one for each way to build: naming another one installs again
stamp = $(shell printf '%s' '$(1)' | cksum | cut -d ' ' -f 1)
INSTALLED := $(VENV)/installed-$(call stamp,$(TORCH))
BUILT := $(VENV)/built-$(call stamp,$(TORCH) $(STGP_NO_EXT) $(CMAKE_ARGS) $(CXX))
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh tests/cpp/* tests/support/cuda_headers/*)

.PHONY: help demo quick test test-all test-vllm test-sglang test-lmms-eval test-llava-next lint wheel bench performance prefill fuzz sanitize cuda-check cuda-link-check header-check compile-check gpu-library gpu-check gpu-rehearsal clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(BUILT) ## the whole chain on a real video
	$(VENV)/bin/stgp demo -o demo.png --force

PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto

quick: $(BUILT) ## golden values, ops, plans and the command line, in less than a minute
	$(PYTEST) -q tests/plan/test_plan.py tests/test_ops.py tests/cli/test_cli.py tests/backends/test_backends.py -k "not test_backends or golden"

test: $(BUILT) ## the tests, without the slow ones
	$(PYTEST) $(ARGS)

test-all: $(BUILT) ## every test, with ten times as many random calls
	$(PYTEST) --slow --hypothesis-profile=thorough $(ARGS)

lint: $(BUILT) ## ruff, mypy and clang-format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

# microbenchmarks for a comparison of two commits; `python -m benchmarks` measures more, and documents are made of that

bench: $(BUILT) ## microbenchmarks under pytest-benchmark
	$(VENV)/bin/python -m pytest benchmarks -q --benchmark-autosave --benchmark-storage=file://.benchmarks \
	    --benchmark-columns=median,iqr,min,rounds --benchmark-sort=min $(ARGS)

# what pooling saves a language model (on a GPU `python -m benchmarks --shape prefill-7b`); docs/performance.md and its
# pictures from the results that are kept

prefill: $(BUILT) ## what pooling saves a language model
	$(VENV)/bin/python -m benchmarks --shape prefill-0.5b $(ARGS)

performance: $(BUILT) ## docs/performance.md and its pictures from the results that are kept
	$(VENV)/bin/python -m benchmarks page $(ARGS)

# CPU kernels: 5 minutes of random calls, memory and threads under sanitizers

fuzz: $(BUILT) ## 5 minutes of random calls of the CPU kernels against the reference
	$(VENV)/bin/python -m tools.fuzz --seconds 300 $(ARGS)

sanitize: $(BUILT) ## the CPU kernels under sanitizers for memory, undefined behaviour and threads
	$(VENV)/bin/python -m tools.sanitize $(ARGS)

# CUDA kernels: what nvcc makes of them; that they link with a CUDA build of torch, which is several GB

cuda-check: $(BUILT) ## what nvcc makes of the CUDA kernels
	$(VENV)/bin/python -m tools.cuda_check $(ARGS)

CUDA_TORCH ?= torch==2.14.1
LINK_TOOLS := numpy|rich|markdown-it-py|mdurl|Pygments|safetensors|setuptools|cmake|ninja|pybind11|pytest|iniconfig|pluggy|packaging|hypothesis|sortedcontainers|exceptiongroup|tomli

cuda-link-check: ## a build with CUDA kernels links with a torch for CUDA; installs several GB
	$(PYTHON) -m venv build/cuda-link
	build/cuda-link/bin/pip install --quiet --disable-pip-version-check "$(CUDA_TORCH)"
	grep -E '^($(LINK_TOOLS))==' requirements.txt | build/cuda-link/bin/pip install --quiet --disable-pip-version-check --no-deps -r /dev/stdin
	build/cuda-link/bin/python -m tools.check_cuda_link $(ARGS)

# the C++ files against the headers of the oldest supported torch and of the one after it, from wheels of 1 GB each

header-check: $(BUILT) ## the C++ files against the headers of torch 2.10 and 2.11
	$(VENV)/bin/python -m tools.check_headers build/headers $(ARGS)

# the models for lmms-eval, in an environment of their own; metadata that `make wheel` leaves in the checkout would hide the
# entry points of what is installed

LMMS_EVAL := build/lmms-eval-venv

test-lmms-eval: ## the models for lmms-eval, in an environment of their own
	$(PYTHON) -m venv $(LMMS_EVAL)
	$(LMMS_EVAL)/bin/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(LMMS_EVAL)/bin/pip install --quiet --disable-pip-version-check --no-deps -r tests/with_lmms_eval/requirements.txt
	rm -rf *.egg-info
	STGP_NO_EXT=1 $(LMMS_EVAL)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(LMMS_EVAL)/bin/python -m pytest tests/with_lmms_eval $(ARGS)

# the patch for LLaVA-NeXT, on its own classes; no package has them under their name

LLAVA_NEXT := build/llava-next-venv

test-llava-next: ## the patch for LLaVA-NeXT on its own classes
	$(PYTHON) -m venv $(LLAVA_NEXT)
	$(LLAVA_NEXT)/bin/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(LLAVA_NEXT)/bin/pip install --quiet --disable-pip-version-check --no-deps -r tests/with_llava_next/requirements.txt
	site=$$($(LLAVA_NEXT)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
	    cp tests/with_vllm/cpu_torchvision.py $$site && echo "import cpu_torchvision" > $$site/cpu_torchvision.pth
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=. $(LLAVA_NEXT)/bin/python -m pytest \
	    --confcutdir=tests/with_llava_next tests/with_llava_next $(ARGS)

# the hooks for SGLang, on its published sources

SGLANG := build/sglang-venv

test-sglang: ## the hooks for SGLang on its published sources
	$(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/pip install --quiet --disable-pip-version-check "$(TORCH)"
	grep -E '^($(LINK_TOOLS))==' requirements.txt | $(SGLANG)/bin/pip install --quiet --disable-pip-version-check --no-deps -r /dev/stdin
	$(SGLANG)/bin/pip install --quiet --disable-pip-version-check --no-deps -r tests/with_sglang/requirements.txt
	rm -rf *.egg-info
	STGP_NO_EXT=1 $(SGLANG)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	OMP_NUM_THREADS=1 $(SGLANG)/bin/python -m pytest tests/with_sglang $(ARGS)

# the plugin for vLLM, in an environment of its own; the package is put beside that, so that an engine can run without it

VLLM := build/vllm-venv

test-vllm: $(VLLM)/installed ## the plugin in a vLLM engine
	rm -rf build/vllm-wheel build/vllm-plugin
	$(VLLM)/bin/python -c "from pathlib import Path; from tests.support.wheels import build_wheel; build_wheel(Path('$(CURDIR)/$(VLLM)/bin/python'), Path('$(CURDIR)/build/vllm-wheel'))"
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps --target build/vllm-plugin build/vllm-wheel/*.whl
	PYTHONPATH=$(CURDIR)/build/vllm-plugin $(VLLM)/bin/pytest --confcutdir=tests/with_vllm -o pythonpath= tests/with_vllm $(ARGS)

$(VLLM)/installed: tests/with_vllm/requirements.txt tests/with_vllm/cpu_torchvision.py
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' tests/with_vllm/requirements.txt)"
	grep -v '^torch==' tests/with_vllm/requirements.txt | $(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps -r /dev/stdin
	site=$$($(VLLM)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
	    cp tests/with_vllm/cpu_torchvision.py $$site && echo "import cpu_torchvision" > $$site/cpu_torchvision.pth
	touch $@

# a wheel with the compiled kernels, built from the sdist, and a check of it in an environment without compiler

wheel: $(INSTALLED) ## source distribution and wheel, checked where there is no compiler
	rm -rf dist
	$(VENV)/bin/python -c "from setuptools.build_meta import build_sdist; build_sdist('dist')"
	$(VENV)/bin/python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist dist/*.tar.gz
	$(VENV)/bin/python -m tools.check_wheel dist/*.whl --torch "$(TORCH)"

# what the Triton kernels compile to with the oldest Triton that is supported; `make test` asks the pinned one
compile-check: $(BUILT) ## what the Triton kernels compile to with the oldest supported Triton
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/oldest-triton triton==3.6.0
	PYTHONPATH=build/oldest-triton $(VENV)/bin/python -m pytest tests/tools/test_compile_report.py

# with the Python that has torch for the GPU, as it is: a checkout needs no installation
gpu-check: ## tests, timings, counters and sanitizers on a machine with a GPU
	@$(PYTHON) -c "import importlib.util as u; raise SystemExit(u.find_spec('torch') is None)" || \
	{ echo "$(PYTHON) has no torch: nothing was measured; PYTHON=… names the one that has it" >&2; exit 2; }
	$(PYTHON) -m tools.gpu_check $(ARGS)

# the library to take along, where PYTHON has the version of the Python there

gpu-library: ## the library to take to that machine
	$(PYTHON) -m venv build/gpu-library
	grep -E '^(setuptools|cmake|ninja|pybind11)==' requirements.txt | build/gpu-library/bin/pip install --quiet --disable-pip-version-check -r /dev/stdin
	PATH="$(CURDIR)/build/gpu-library/bin:$$PATH" build/gpu-library/bin/python -m tools.gpu_library build/headers $(ARGS)

# all of gpu-check on a CPU, on a copy of the tree without its history, with torch and Triton as on such a machine. The
# interpreter of Triton 3.6 needs NumPy below 2.4

GPU_TORCH ?= torch==2.11.0
REHEARSAL := build/gpu-rehearsal

gpu-rehearsal: gpu-library ## gpu-check from end to end on a CPU
	$(PYTHON) -m venv $(REHEARSAL)/venv
	$(REHEARSAL)/venv/bin/pip install --quiet --disable-pip-version-check "$(GPU_TORCH)"
	grep -E '^($(LINK_TOOLS)|pytest-xdist|execnet)==' requirements.txt | grep -v '^numpy' | $(REHEARSAL)/venv/bin/pip install --quiet --disable-pip-version-check --no-deps -r /dev/stdin
	$(REHEARSAL)/venv/bin/pip install --quiet --disable-pip-version-check --no-deps numpy==2.3.5
	rm -rf $(REHEARSAL)/tree && mkdir -p $(REHEARSAL)/tree
	git archive HEAD | tar -x -C $(REHEARSAL)/tree
	cp stgridpool_kernels/_C.cpython-312-*.so $(REHEARSAL)/tree/stgridpool_kernels/
	PATH="$(CURDIR)/$(REHEARSAL)/venv/bin:$$PATH" STGP_COMMIT=$$(git rev-parse HEAD) $(MAKE) -C $(REHEARSAL)/tree gpu-check PYTHON=python ARGS="--stand-ins tests.tools.gpu_stand_ins --limit 1800 $(ARGS)"

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

clean: ## remove what was built
	rm -rf $(VENV) .benchmarks build dist *.egg-info stgridpool_kernels/_C*.so demo.png
