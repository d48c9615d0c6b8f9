# rollcast: `make` lists the targets. The first one that runs something installs into .venv, once.

PYTHON ?= python3
NPROC  ?= 2
ARGS        ?=
PYTEST_ARGS ?=
# Two processes; tests that start engines, which need all cores, run in one of them, after all others.
PARALLEL    := -n 2 --dist loadscope --no-loadscope-reorder

ifndef PLATFORM
PLATFORM := $(shell if nvidia-smi -L 2>/dev/null | grep -q . || test -e /dev/nvidia0; then echo cuda; else echo cpu; fi)
endif
ifeq ($(filter $(PLATFORM),cpu cuda),)
$(error PLATFORM is "$(PLATFORM)": it must be cpu or cuda)
endif

BIN          := .venv/bin
STAMP        := .venv/.installed-$(PLATFORM)
REQUIREMENTS := requirements-$(PLATFORM).txt
PIP_INSTALL  := $(BIN)/pip --disable-pip-version-check install -qq
NO_DEPS_cpu  := --no-deps

# Set, or torchrun warns: the cores shared out among the ranks.
demo: export OMP_NUM_THREADS ?= $(shell n=$$(( $$(nproc) / $(NPROC) )); echo $$(( n > 0 ? n : 1 )))

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint install clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "make %-9s %s\n", $$1, $$2 }'

demo: $(STAMP)  ## train a tiny model with GRPO (ARGS="--seed 7", NPROC=2)
	$(BIN)/torchrun --standalone --nproc-per-node $(NPROC) -m rollcast.launch.grpo $(ARGS)

test: $(STAMP)  ## run the tests, linter and type checker included (PYTEST_ARGS=...)
	$(BIN)/pytest $(PARALLEL) -m "not slow" $(PYTEST_ARGS)

test-all: $(STAMP)  ## the same, slow tests included
	$(BIN)/pytest $(PARALLEL) $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff check, ruff format --check, pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

install: $(STAMP)  ## fill .venv (PLATFORM=cpu or cuda, PYTHON=python3; make clean first to change PYTHON)

clean:  ## remove .venv, builds and caches
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find comm rollout launch benchmarks tests -name __pycache__ -prune -exec rm -rf {} +

# No stamp: never installed, interrupted, or made for the other platform: start from nothing.
# A stamp that is too old: bring the environment up to date.
$(STAMP): $(REQUIREMENTS) setup.py pyproject.toml
	@if test -e $@; then echo "Updating rollcast for $(PLATFORM) in .venv"; else $(MAKE) --no-print-directory .new-venv; fi
	@test $(PLATFORM) = cuda || $(PIP_INSTALL) --no-deps "$$(grep '^torch==' $(REQUIREMENTS))+cpu" || { \
	    echo "pip sees no CPU build of torch: name PyTorch's index of CPU builds in PIP_EXTRA_INDEX_URL and repeat." >&2; exit 1; }
	@$(PIP_INSTALL) $(NO_DEPS_$(PLATFORM)) -r $(REQUIREMENTS)
	@$(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

# The base interpreter, not the command as typed: that may be a pyenv shim, or live in the .venv we remove.
.PHONY: .new-venv
.new-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || { \
	    echo "rollcast needs Python 3.11 or 3.12; $(PYTHON) is not. Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' || { \
	    echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing rollcast for $(PLATFORM) into .venv (once, about 2 minutes)"
	@python=$$($(PYTHON) -c 'import sys; print(sys._base_executable)') && rm -rf .venv && "$$python" -m venv .venv
