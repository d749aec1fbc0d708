# Every target sets up what it needs; `make demo` and `make test` work in a fresh clone.
#   PYTHON=python3.12   which Python makes the environment (3.11 or newer; found by itself otherwise)
#   VENV=.venv          where it is made
#   ARGS='-k sigmas'    handed to pytest, the demo or the benchmarks

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
ARGS ?=
RUN = $(VENV)/bin/python
BENCHMARKS = startup serve_start loading step walk

.DEFAULT_GOAL = help
.PHONY: help setup demo test check format bench serve clean

help:
	@echo "make demo    pictures of several prompts, drawn by the model that ships with the project"
	@echo "make serve   the HTTP service, with the model in models/ or the one that ships with the project"
	@echo "make test    all tests; ARGS='...' goes to pytest"
	@echo "make check   ruff and pyright"
	@echo "make bench   benchmarks; results in benchmarks/results"
	@echo "make setup   only the environment ($(VENV))"

$(RUN):
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer was found; name one: make PYTHON=/path/to/python3" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip

# Stamps tell what is installed: the package alone, or with the packages of an extra.
$(VENV)/.installed: pyproject.toml constraints.txt | $(RUN)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(RUN)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@ $(VENV)/.installed

setup: $(VENV)/.installed
	@echo "ready: $(VENV)"

# Its production job enlarges by a network.
demo: $(VENV)/.installed-upscale
	$(RUN) -m lightweight_engine demo $(ARGS)

test: $(VENV)/.installed-test
	$(RUN) -m pytest $(ARGS)

check: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)

format: $(VENV)/.installed-dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(VENV)/.installed-bench
	@for name in $(BENCHMARKS); do echo "== $$name"; $(RUN) -m benchmarks.$$name $(ARGS) || exit 1; done

serve: $(VENV)/.installed-serve
	$(RUN) -m lightweight_engine serve $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
