# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Stamps in .venv record what is installed, so that a second run installs nothing.
# TORCH=any takes the build of torch that pip chooses (on Linux CUDA's) where the default looks for a CPU build.

VENV := .venv
TORCH ?= cpu
BIN := $(VENV)/bin
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3.14 python3 python,$(call usable,$(name))))
BENCHMARKS ?= $(sort $(filter-out benchmarks/_% benchmarks/demo.py benchmarks/widen.py benchmarks/other_vocabulary.py,$(wildcard benchmarks/*.py)))

# $(call usable,NAME): NAME where it runs, is 3.11 or newer and can make virtual environments; else nothing.
usable = $(shell $(1) -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(1))

# $(call install,ENVIRONMENT,VERSIONS): see scripts/install.py.
install = $(1)/bin/python scripts/install.py $(2) --torch $(TORCH)

.PHONY: help demo native sanitize cross test test-lowest test-latest check format bench constraints clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@echo "make demo    decode the bundled pair with and without drafting; equal tokens and the speed-up"
	@echo "make native  build the native library anew"
	@echo "make sanitize  run its passes under the address, undefined-behaviour and thread sanitizers"
	@echo "make cross   compile it for aarch64, and run that by qemu-user (RUN='command' for another emulator)"
	@echo "make test    run the tests (ARGS='-k cache' is passed to pytest)"
	@echo "make check   ruff, mypy --strict, import-linter"
	@echo "make format  let ruff rewrite what it can"
	@echo "make bench   run the benchmarks (BENCHMARKS=benchmarks/x.py for one)"
	@echo "make clean   remove the virtual environments and the caches"
	@echo "make test-lowest, make test-latest"
	@echo "             demo and contract with the lowest or newest versions that we allow (SHORT=1: a part of it)"
	@echo "make constraints"
	@echo "             renew constraints.txt, the exact versions that the other commands install"

demo: $(VENV)/.installed
	$(BIN)/python benchmarks/demo.py $(ARGS)

native: $(VENV)/.installed
	$(BIN)/python src/foredraft/native/build.py

sanitize: $(VENV)/.installed
	$(BIN)/python scripts/sanitize_native.py

cross: $(VENV)/.installed
	$(BIN)/python -m ziglang version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet ziglang
	$(BIN)/python scripts/cross_native.py $(if $(RUN),--run "$(RUN)") $(ARGS)

# Tests compute on one thread each, so there is a process for each core; ARGS='-n 0' runs them in one.
WORKERS := -n auto --dist worksteal
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

# What a release of torch or transformers breaks first: the demo, every drafter's contract, other models' own modules.
CONTRACT := tests/test_contract.py tests/test_adapter.py
PART := (llama and bfloat16) or gpt2
test-lowest test-latest: test-%: .venv-%/bin/pip
	$(call install,.venv-$*,$*) --also pytest pytest-xdist accelerate
	.venv-$*/bin/python benchmarks/demo.py --rounds 1
	.venv-$*/bin/python -m pytest $(WORKERS) $(CONTRACT) $(if $(SHORT),-k "$(PART)") $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev
	@test -n "$(BENCHMARKS)" || { echo "benchmarks/ holds no benchmark" >&2; exit 1; }
	@for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python "$$script" $(ARGS) || exit 1; done

constraints:
	rm -rf .venv-constraints
	$(MAKE) .venv-constraints/bin/pip
	$(call install,.venv-constraints,latest) --extras dev,serve,bench --also hatchling editables
	.venv-constraints/bin/python scripts/constrain.py
	rm -rf .venv-constraints

clean:
	rm -rf $(VENV) .venv-* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist

%/bin/pip:
	@test -n "$(strip $(PYTHON))" || { \
		echo "foredraft needs Python 3.11 or newer with the venv module, and none was found." >&2; \
		echo "Install one (Debian, Ubuntu: apt install python3-venv) or name it: make demo PYTHON=/path/to/python3" >&2; \
		exit 1; }
	$(PYTHON) -m venv $*

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/pip
	@echo 'installing foredraft into $(VENV); on the first run this takes some minutes'
	$(call install,$(VENV),pinned)
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(call install,$(VENV),pinned) --extras $*
	@touch $@
