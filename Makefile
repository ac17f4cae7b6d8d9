# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Stamps in .venv record what is installed, so that a second run installs nothing.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3.14 python3 python,$(call usable,$(name))))
BENCHMARKS ?= $(sort $(filter-out benchmarks/_% benchmarks/demo.py benchmarks/widen.py,$(wildcard benchmarks/*.py)))

# $(call usable,NAME): NAME where it runs, is 3.11 or newer and can make virtual environments; else nothing.
usable = $(shell $(1) -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(1))

.PHONY: help demo native sanitize test check format bench clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@echo "make demo    decode the bundled pair with and without drafting; equal tokens and the speed-up"
	@echo "make native  build the native library anew"
	@echo "make sanitize  run its driver under the address, undefined and thread sanitizers"
	@echo "make test    run the tests (ARGS='-k cache' is passed to pytest)"
	@echo "make check   ruff, mypy --strict, import-linter"
	@echo "make format  let ruff rewrite what it can"
	@echo "make bench   run the benchmarks (BENCHMARKS=benchmarks/x.py for one)"
	@echo "make clean   remove the virtual environment and the caches"

demo: $(VENV)/.installed
	$(BIN)/python benchmarks/demo.py $(ARGS)

native: $(VENV)/.installed
	$(BIN)/python src/foredraft/native/build.py

sanitize: | $(BIN)/pip
	$(BIN)/python scripts/sanitize_native.py

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-bench
	@test -n "$(BENCHMARKS)" || { echo "benchmarks/ holds no benchmark" >&2; exit 1; }
	@for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python "$$script" $(ARGS) || exit 1; done

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist

$(BIN)/pip:
	@test -n "$(strip $(PYTHON))" || { \
		echo "foredraft needs Python 3.11 or newer with the venv module, and none was found." >&2; \
		echo "Install one (Debian, Ubuntu: apt install python3-venv) or name it: make demo PYTHON=/path/to/python3" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/pip
	@echo 'installing foredraft into $(VENV); on the first run this takes some minutes'
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@
