# Set-up, demo, tests and checks. `make demo` and `make test` need nothing but Python 3.11, git, make and g++.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h')
# GCC 12 warns of uninitialised values inside its own AVX-512 headers.
CXXFLAGS := -std=c++17 -O2 -Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized -ffp-contract=off

.PHONY: setup demo test test-gpu-static gpu lint check-kernels check-aarch64 bench-steps sanitize benchmarks readme-tables docs clean

setup: $(VENV)/.built

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet 'setuptools>=77' ninja 'pybind11>=2.13'
	XTG_BUILD_CPP=0 $(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[test,lint]'
	touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(CSRC)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

demo: setup
	$(BIN)/python -m xtrimogene.demo --output demo_output

# A file of tests goes to one process, since tests of a file share what is dear to make. A process has one thread, but
# where a test asks for more; those that wait must not spin, since processes would take the cores from each other.
test: setup check-kernels
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# What is known of GPUs without one, and too long for every `make test`: the ahead-of-time checks of the Triton kernels,
# with every shipped launch config, for every GPU, and the rehearsal of `make gpu`. XTG_GPU_STATIC_PART=0/7 takes a
# seventh of the configs.
test-gpu-static: setup
	$(BIN)/python -m pytest -m gpu_static tests/benchmarks/static tests/benchmarks/gpu

# The day a GPU is there: checks, sanitizer, tuning, times, into build/gpu. Cut off, it goes on where it was.
gpu: setup
	$(BIN)/python -m benchmarks.gpu

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The torch-free kernels against plain loops, without Python.
check-kernels: build/kernels_check
	build/kernels_check

X86 := $(if $(filter x86_64,$(shell uname -m)),avx2 avx512 avx512bf16 amx x86)
AVX512 := -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq
ISA_avx2 := -mavx2 -mfma -mf16c
ISA_avx512 := $(AVX512)
ISA_avx512bf16 := $(AVX512) -mavx512bf16
ISA_amx := $(AVX512) -mavx512bf16 -mamx-tile -mamx-bf16

build/isa_%.o: csrc/cpu/isa/%.cpp $(CSRC)
	@mkdir -p build
	$(CXX) $(CXXFLAGS) $(ISA_$*) -c $< -o $@

build/kernels_check: csrc/check/kernels_check.cpp csrc/common/isa.cpp $(foreach isa,scalar $(X86),build/isa_$(isa).o)
	$(CXX) $(CXXFLAGS) $^ -o $@

# Time of the steps of the attention forward, the ladder of csrc/README.md (x86-64).
build/attention_steps: csrc/check/attention_steps.cpp csrc/common/isa.cpp $(foreach isa,scalar $(X86),build/isa_$(isa).o)
	$(CXX) $(CXXFLAGS) -O3 $(ISA_amx) $^ -o $@

bench-steps: build/attention_steps
	build/attention_steps

# The portable kernels for 64-bit Arm, run in an emulator (Debian: g++-aarch64-linux-gnu, qemu-user).
check-aarch64: $(CSRC)
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null || \
	  { echo "check-aarch64 needs a cross compiler and an emulator: apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }
	@mkdir -p build
	aarch64-linux-gnu-g++ $(CXXFLAGS) -static csrc/check/kernels_check.cpp csrc/common/isa.cpp csrc/cpu/isa/scalar.cpp \
	  -o build/kernels_check_aarch64
	qemu-aarch64 build/kernels_check_aarch64

# The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: their check, then the tests of ops and packer,
# in a copy of the tree with a build of its own. libstdc++ is preloaded too, so that exceptions are intercepted, and
# pytest leaves the standard error alone, where a sanitizer writes its last words.
SANITIZED := build/sanitize
SANITIZE := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZED_TESTS ?= tests/xtg_kernels/test_ragged_attention.py tests/xtg_kernels/test_expression_embedding.py \
  tests/xtg_kernels/test_masked_decoder_gather.py tests/xtg_kernels/test_masked_head.py \
  tests/xtg_kernels/test_favor_attention.py tests/xtg_kernels/test_dropout.py tests/xtrimogene/cells/test_packing.py \
  tests/xtrimogene/cells/test_masking.py

$(SANITIZED)/isa_%.o: csrc/cpu/isa/%.cpp $(CSRC)
	@mkdir -p $(SANITIZED)
	$(CXX) $(CXXFLAGS) $(SANITIZE) $(ISA_$*) -c $< -o $@

$(SANITIZED)/kernels_check: csrc/check/kernels_check.cpp csrc/common/isa.cpp \
    $(foreach isa,scalar $(X86),$(SANITIZED)/isa_$(isa).o)
	$(CXX) $(CXXFLAGS) $(SANITIZE) $^ -o $@

sanitize: setup $(SANITIZED)/kernels_check
	ASAN_OPTIONS=detect_leaks=0 $(SANITIZED)/kernels_check
	cp -rp setup.py pyproject.toml README.md LICENSE csrc xtg_kernels xtrimogene benchmarks tests $(SANITIZED)/
	rm -f $(SANITIZED)/xtg_kernels/_C*.so
	cd $(SANITIZED) && XTG_SANITIZE=1 $(CURDIR)/$(BIN)/python setup.py --quiet build_ext --inplace
	cd $(SANITIZED) && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  $(CURDIR)/$(BIN)/python -m pytest -q -x --capture=sys -p no:cacheprovider $(SANITIZED_TESTS)

# All benchmarks, for half an hour on a machine that does nothing else, and the tables that show them.
benchmarks: setup
	for name in pack loader attention favor favor_memory embedding encoder gather head embed memory step dropout ranks savings accelerated; do \
	  $(BIN)/python -m benchmarks.run $$name --out benchmarks/results/$$name.csv || exit 1; done
	$(BIN)/python -m benchmarks.readme

readme-tables: setup
	$(BIN)/python -m benchmarks.readme

$(VENV)/.docs: $(VENV)/.built
	XTG_BUILD_CPP=0 $(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[docs]'
	touch $@

# The documentation site, into build/site: offline, with its notebooks run, two pages at a time; warnings are errors. Then
# the notebooks as a reader would run them, twice in one folder.
docs: $(VENV)/.docs
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -q -j 2 -b html docs build/site
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m docs tests/test_pages.py

clean:
	rm -rf build dist demo_output *.egg-info xtg_kernels/_C*.so
