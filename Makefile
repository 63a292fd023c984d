# Two commands matter: `make book` and `make test`. Python 3.10 to 3.13 and make are all they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := $(shell grep -o '^torch==[0-9.]*' constraints.txt)

.PHONY: help book test html pdf epub wheel lab benchmark data clean
.DEFAULT_GOAL := help

help:           ## show this list
	@grep -E '^[a-z]+: .*##|^[a-z]+:  *##' Makefile | sed -E 's/^([a-z]+):.*## /  make \1\t/'

book: data      ## PDF, EPUB, site and wheel
	$(BIN)/python book/build.py all

html pdf epub wheel: data  ## one product only
	$(BIN)/python book/build.py $@

test: data      ## sync, lint, every notebook, every test
	$(BIN)/ruff check .
	$(BIN)/python -m pytest tests/test_sync.py
	OMP_NUM_THREADS=1 $(BIN)/python book/build.py test
	$(BIN)/python -m pytest tests --ignore tests/test_sync.py

lab: data       ## open the notebooks
	$(BIN)/jupyter lab nbs

benchmark: data ## measurements beside peers, one table each
	@for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

data: $(READY)
	@$(BIN)/llm-from-scratch data get shakespeare --quiet

$(READY): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
		{ echo "$(PYTHON) is not Python 3.10 to 3.13; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(BIN)/python -c 'import ssl' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt pip setuptools wheel
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev,figures,tensorboard,hub]'
	@touch $@

clean:          ## remove what was built; keeps the environment and the data
	rm -rf _build dist build *.egg-info
