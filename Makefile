# Everything runs in .venv, which makes itself: the first `make test` on a fresh machine installs, later ones start at once.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed

# Two threads of one process are slower than one when the other core is busy; nothing here needs the network.
export OMP_NUM_THREADS := 1
export HF_HUB_OFFLINE  := 1

.PHONY: help install demo test check lint format bench base clean

help:             ## Show this list.
	@sed -n 's/^\([a-z]*\): .*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(READY)    ## MERA against fine-tuning on the mini world, then its report: runs/mera-miniworld/report.html.
	$(BIN)/graftlm run mera-miniworld --out runs/mera-miniworld

test: lint        ## Lint, types and every test.
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: lint       ## Lint, types and the quick tests.
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

lint: $(READY)    ## Lint, format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## Put the code in order.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)   ## The committed table: eight methods, two orders, three seeds. Most of an hour; resumes.
	$(BIN)/python benchmarks/mera_miniworld.py run
	$(BIN)/python benchmarks/mera_miniworld.py table

base: $(READY)    ## Train the mini world's LLM and encoders again, from nothing.
	rm -rf build/base
	$(BIN)/graftlm build-base --out build/base
	rm -rf graftlm/data/miniworld/base
	mv build/base graftlm/data/miniworld/base

install: $(READY) ## Make the environment.

clean:            ## Remove caches and what was built; runs and the environment stay.
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find graftlm tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that the build that constraints.txt names is taken from wherever pip finds it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, this is {v[0]}.{v[1]}: make PYTHON=... names another.")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@
