# Two commands for a newcomer, from a bare Python >= 3.11:
#
#     make demo     set up .venv and run the bundled model
#     make test     set up .venv if need be and run the tests
#
# PYTHON=python3.12 names the interpreter, EXTRA=cpu|cuda12|cuda13 the JAX to install.

VENV := .venv
BIN := $(VENV)/bin

# Each worker is a process with a JAX of its own, hence at most four; a file's tests stay in one and share its fixtures.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Where an NVIDIA driver answers, its CUDA major version picks the extra; everywhere else plain JAX runs on the CPU.
ifndef EXTRA
EXTRA := $(shell nvidia-smi 2>/dev/null \
  | sed -n 's/.*CUDA [A-Z ]*Version: *\([0-9][0-9]*\).*/\1/p' | head -n 1 \
  | { read -r major; if [ "0$$major" -ge 13 ]; then echo cuda13; elif [ "0$$major" -eq 12 ]; then echo cuda12; else echo cpu; fi; })
endif
ifeq ($(filter $(EXTRA),cpu cuda12 cuda13),)
$(error EXTRA=$(EXTRA) is not known: use cpu, cuda12 or cuda13)
endif

# constraints.txt pins what the tests on CPU run with. A CUDA set-up is not held to it: which JAX serves a GPU depends
# on its driver and on the Python at hand, so pip takes the newest release that fits.
ifeq ($(EXTRA),cpu)
WHAT := -c constraints.txt -e ".[dev,notebooks]"
else
WHAT := -e ".[dev,notebooks,$(EXTRA)]"
endif

# The stamp appears only after a complete set-up; $(STARTED) marks one that was broken off.
STAMP := $(VENV)/.installed-$(EXTRA)
STARTED := $(VENV)/.started

# The first interpreter that is new enough and can make virtual environments.
define find_python
python="$(PYTHON)"; \
if [ -z "$$python" ]; then \
  for name in python3 python3.13 python3.12 python3.11 python3.14 python; do \
    if "$$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
    then python="$$name"; break; fi; \
  done; \
fi; \
if [ -z "$$python" ]; then \
  echo "error: no Python >= 3.11 with the venv and ensurepip modules was found: install one (on Debian and Ubuntu: python3 and python3-venv), or name it: make PYTHON=/path/to/python3" >&2; exit 1; \
fi; \
if ! "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
  echo "error: PYTHON=$$python does not run, or is older than 3.11" >&2; exit 1; \
fi; \
if ! "$$python" -c 'import venv, ensurepip' >/dev/null 2>&1; then \
  echo "error: $$python lacks the venv or ensurepip module (on Debian and Ubuntu: install python3-venv)" >&2; exit 1; \
fi
endef

.PHONY: help demo test test-all lint format clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18
	@echo "set-up: $(VENV) with EXTRA=$(EXTRA) (cpu, cuda12 or cuda13); PYTHON names the interpreter"

demo: $(STAMP)  ## let the bundled model go on with a prompt: as it is, with a draft, with an adapter; then 16 prompts at once
	$(BIN)/realm generate --prompt "The capital of France is" --max-new-tokens 24
	$(BIN)/realm generate --prompt "The capital of France is" --max-new-tokens 24 --draft realm_jax/assets/tiny-draft.gguf
	$(BIN)/realm generate --prompt "The capital of France is" --max-new-tokens 24 --adapter realm_jax/assets/tiny-pirate
	@mkdir -p runs
	$(BIN)/realm batch configs/demo_requests.jsonl --out runs/demo_results.jsonl --overwrite --max-len 128 \
	  --adapter pirate=realm_jax/assets/tiny-pirate --adapter telegram=realm_jax/assets/tiny-telegram.gguf
	@$(BIN)/python -c 'import json; [print("%-12s%r" % (r["id"], r["text"])) for r in map(json.loads, open("runs/demo_results.jsonl"))]'

test: $(STAMP)  ## run the tests, without the slow ones
	$(PYTEST) -m "not slow"

test-all: $(STAMP)  ## run all tests
	$(PYTEST)

lint: $(STAMP)  ## check style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(STAMP)  ## mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove .venv and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A set-up that was broken off, or one for another EXTRA, starts from an empty environment; pip's cache makes it quick.
$(STAMP): pyproject.toml constraints.txt
	@$(find_python); \
	clear=; \
	if [ -e $(STARTED) ]; then clear=--clear; fi; \
	for other in $(VENV)/.installed-*; do \
	  if [ -e "$$other" ] && [ "$$other" != $(STAMP) ]; then clear=--clear; fi; \
	done; \
	echo "setting up $(VENV) with $$("$$python" --version), $(EXTRA): this takes a minute or two"; \
	"$$python" -m venv $$clear $(VENV)
	@touch $(STARTED)
	@rm -f $(VENV)/.installed-*
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(WHAT)
	@rm -f $(STARTED)
	@touch $@
