# Everything runs in a virtual environment of its own, which the first target that needs it makes.
#
#   make demo      trains small models on real data with every cls_rope and prints a table
#   make test      all tests            make lint      formatting, types, static analysis
#   make build     the native parts     make format    formats the sources
#   make bench     times everything beside its peers and the machine's limits (BENCH_FLAGS=--quick: 2 minutes)
#   make bench-native  micro-benchmarks of the kernels alone; needs Google Benchmark
#   make sanitize  the kernels under AddressSanitizer and UndefinedBehaviorSanitizer
#   make cuda-report  what is known of the CUDA kernels without a GPU, into docs/cuda.md; needs nvcc
#                     (CUDA_REPORT_FLAGS=--reuse: with the library as it was built for the last report)
#   make test-next-torch  the binary built for one torch, tested on a later one
#   make test-old-x-transformers  the adapter on the oldest x-transformers it supports

PYTHON ?= python3
VENV ?= .venv
NEXT_VENV ?= .venv-next
TORCH ?= torch==2.13.0
NEXT_TORCH ?= torch==2.14.1
OLD_X_TRANSFORMERS ?= x-transformers==2.11.23
# Further options of pip, for example PIP_FLAGS="--extra-index-url URL" for an index with CPU builds of torch.
PIP_FLAGS ?=
PYTEST_FLAGS ?=
DEMO_FLAGS ?=
BENCH_FLAGS ?=
# Of Google Benchmark, for example --benchmark_filter=avx512/attention
BENCH_NATIVE_FLAGS ?=
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

# CUDA kernels are built for the GPU of this machine. Where there is none, the tests build them for the simulator of
# tests/cudasim (where nvcc is), and that is enough; X_ROPE_CLS_CUDA=1 builds them for all GPUs, as `pip install .` does.
GPUS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | tr '\n' ' ')
X_ROPE_CLS_CUDA ?= $(if $(strip $(GPUS)),,0)
TORCH_CUDA_ARCH_LIST ?= $(if $(filter 0 1,$(X_ROPE_CLS_CUDA)),,$(strip $(GPUS)))
export X_ROPE_CLS_CUDA TORCH_CUDA_ARCH_LIST

bin := $(VENV)/bin
pip := $(bin)/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS)
native_sources := $(shell find csrc cmake -type f) CMakeLists.txt
cpp_sources := $(shell find csrc examples tests benchmarks -path tests/cudasim -prune -o \( -name "*.h" -o -name "*.cpp" -o -name "*.cuh" -o -name "*.cu" \) -print)
python_sources := x_rope_cls tests setup.py $(wildcard benchmarks examples tools)
quick_tests := $(addprefix tests/test_,build.py dispatcher.py errors.py rope.py attention_forward.py attention_backward.py \
    late_cls_pool_forward.py late_cls_pool_dispatcher.py)

.PHONY: demo test build bench bench-native lint format sanitize cuda-report test-next-torch test-old-x-transformers clean
.DELETE_ON_ERROR:

demo: $(VENV)/.stamp-demo $(VENV)/.stamp-build
	$(bin)/python -m x_rope_cls demo $(DEMO_FLAGS)

test: $(VENV)/.stamp-test $(VENV)/.stamp-build
	$(bin)/python -m pytest $(PYTEST_FLAGS)

build: $(VENV)/.stamp-build

bench: $(VENV)/.stamp-test $(VENV)/.stamp-build
	$(bin)/python -m benchmarks $(BENCH_FLAGS)

bench-native: $(VENV)/.stamp-torch
	$(bin)/cmake -S . -B build/bench -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(bin))/ninja -DX_ROPE_CLS_TORCH=OFF \
	    -DX_ROPE_CLS_PYTHON=OFF -DX_ROPE_CLS_CUDA=0 -DX_ROPE_CLS_NATIVE_BENCHMARKS=ON
	$(bin)/cmake --build build/bench --parallel $(JOBS)
	build/bench/benchmarks/native/kernels_bench $(BENCH_NATIVE_FLAGS)

# ---- environment ---------------------------------------------------------------------------------

$(bin)/python:
	$(PYTHON) -c 'import sys; sys.exit("make needs Python 3.11 or newer, got " + sys.version) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-torch: requirements/build.txt | $(bin)/python
	$(pip) $(TORCH) -r requirements/build.txt
	@touch $@

$(VENV)/.stamp-demo: requirements/demo.txt $(VENV)/.stamp-torch
	$(pip) $(TORCH) -r requirements/demo.txt
	@touch $@

$(VENV)/.stamp-test: requirements/test.txt requirements/without-deps.txt $(VENV)/.stamp-demo
	$(pip) $(TORCH) -r requirements/test.txt
	$(pip) --no-deps -r requirements/without-deps.txt
	@touch $@

$(VENV)/.stamp-lint: requirements/lint.txt $(VENV)/.stamp-demo
	$(pip) -r requirements/lint.txt
	@touch $@

# The test-only variant of the kernels is built too, so that tests cover 16 lanes on every x86 machine.
$(VENV)/.stamp-build: $(native_sources) setup.py pyproject.toml $(VENV)/.stamp-torch
	PATH="$(abspath $(bin)):$$PATH" MAX_JOBS=$(JOBS) X_ROPE_CLS_TEST_ISA=1 $(bin)/python setup.py -q build_ext --inplace
	PATH="$(abspath $(bin)):$$PATH" MAX_JOBS=$(JOBS) X_ROPE_CLS_TEST_ISA=1 $(pip) --no-build-isolation --no-deps -e .
	@touch $@

# ---- checks --------------------------------------------------------------------------------------

lint: $(VENV)/.stamp-lint
	$(bin)/ruff check $(python_sources)
	$(bin)/ruff format --check $(python_sources)
	$(bin)/mypy
	$(bin)/clang-format --dry-run --Werror $(cpp_sources)
	tools/clang_tidy.sh $(bin) build/lint $(JOBS)

format: $(VENV)/.stamp-lint
	$(bin)/ruff check --fix-only $(python_sources)
	$(bin)/ruff format $(python_sources)
	$(bin)/clang-format -i $(cpp_sources)

sanitize: $(VENV)/.stamp-torch
	$(bin)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(bin))/ninja -DX_ROPE_CLS_TORCH=OFF \
	    -DX_ROPE_CLS_PYTHON=OFF -DX_ROPE_CLS_TEST_ISA=ON -DX_ROPE_CLS_NATIVE_TESTS=ON \
	    -DX_ROPE_CLS_SANITIZE=address,undefined
	$(bin)/cmake --build build/sanitize --parallel $(JOBS)
	build/sanitize/tests/native/kernels_test
	build/sanitize/tests/native/launch_test
	build/sanitize/tests/native/tasks_test

# ---- CUDA without a GPU --------------------------------------------------------------------------

$(VENV)/.stamp-cuda: Makefile | $(VENV)/.stamp-test
	$(pip) nvidia-cuda-nvdisasm
	@touch $@

cuda-report: $(VENV)/.stamp-cuda $(VENV)/.stamp-build
	PATH="$(abspath $(bin)):$$PATH" MAX_JOBS=$(JOBS) $(bin)/python tools/cuda_report.py $(CUDA_REPORT_FLAGS) \
	    --nvdisasm "$$(find $(VENV)/lib -name nvdisasm -type f | head -1)"

# ---- the same binary on a later torch ------------------------------------------------------------

next := $(NEXT_VENV)/bin

$(NEXT_VENV)/.stamp-test: requirements/demo.txt requirements/test.txt
	$(PYTHON) -m venv $(NEXT_VENV)
	$(next)/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) $(NEXT_TORCH) \
	    -r requirements/demo.txt -r requirements/test.txt
	@touch $@

test-next-torch: $(VENV)/.stamp-build $(NEXT_VENV)/.stamp-test
	rm -rf build/wheels
	PATH="$(abspath $(bin)):$$PATH" MAX_JOBS=$(JOBS) $(bin)/python -m pip wheel -q --no-build-isolation --no-deps -w build/wheels .
	$(next)/python -m pip install -q --no-deps --force-reinstall build/wheels/*.whl
	cd build && $(abspath $(next))/python -c \
	    'import torch, x_rope_cls as x; print(torch.__version__, x.__file__); assert "site-packages" in x.__file__'
	$(next)/pytest -m "not slow" $(PYTEST_FLAGS) $(quick_tests)

# ---- the oldest x-transformers -------------------------------------------------------------------

old := build/old-x-transformers

$(VENV)/.stamp-old-x-transformers: Makefile $(VENV)/.stamp-test
	rm -rf $(old)
	$(pip) --no-deps --target $(old) $(OLD_X_TRANSFORMERS)
	@touch $@

test-old-x-transformers: $(VENV)/.stamp-old-x-transformers $(VENV)/.stamp-build
	PYTHONPATH=$(old) $(bin)/python -m pytest $(PYTEST_FLAGS) $(wildcard tests/test_xt_*.py)

clean:
	rm -rf build dist $(VENV) $(NEXT_VENV) x_rope_cls/lib x_rope_cls/_C.*.so *.egg-info
