# Every target makes and fills .venv first, if it is not there yet; the only thing needed is Python 3.11 or newer.
#
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu   torch for the CPU, without gigabytes of CUDA libraries
#   make test PYTHON=/opt/python3.12/bin/python3                 a certain interpreter
#   make test ARGS="tests/test_data_files.py -k folder"                some of the tests

PYTHON ?=
TORCH_INDEX ?=
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PIP := $(PY) -m pip --disable-pip-version-check --no-input
# 3.11 first, because constraints.txt was made with it
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3.11 python3.12 python3.13 python3.14 python3 python)

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint bench docs site clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-6s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP)  ## .venv with the package, its extras dev, docs, hf and web, and the versions of constraints.txt

$(PY):
	@for python in $(CANDIDATES); do \
	  if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    echo "making $(VENV) with $$("$$python" --version)"; exec "$$python" -m venv $(VENV); \
	  fi; \
	done; \
	echo "no Python 3.11 or newer with venv and pip among: $(CANDIDATES). Install one (on Debian and Ubuntu also its" \
	  "python3-venv package), or name it: make PYTHON=/path/to/python3" >&2; exit 1

# the interpreter is order-only: its own date says nothing about what is installed
$(STAMP): pyproject.toml constraints.txt | $(PY)
	$(PIP) install -q torch -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	$(PIP) install -q -e '.[dev,docs,hf,web]' -c constraints.txt
	@touch $@

# idle OpenMP threads that spin take the cores from those that work
demo test bench: export OMP_WAIT_POLICY := passive
# a worker per core, a thread per worker
test: export OMP_NUM_THREADS := 1

demo: $(STAMP)  ## train, calibrate, distil and compare on the digits, into runs/demo
	$(VENV)/bin/fewstep demo --out runs/demo --overwrite $(ARGS)

test: $(STAMP)  ## all tests (ARGS chooses some)
	$(PY) -m pytest $(ARGS)

lint: $(STAMP)  ## ruff, its formatter and mypy; changes nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(STAMP)  ## every program in benchmarks/ with its defaults; takes long
	@programs=$$(grep -l '__main__' benchmarks/*.py 2>/dev/null); \
	if [ -z "$$programs" ]; then echo "benchmarks/ holds no program" >&2; exit 1; fi; \
	for program in $$programs; do echo "== $$program"; $(PY) "$$program" $(ARGS) || exit 1; done

docs: $(STAMP)  ## the pages of docs/ that are made from code and results, their pictures, and the site
	$(PY) docs/build.py
	$(PY) docs/pictures.py
	$(PY) -m mkdocs build --strict

site: $(STAMP)  ## the site alone, from the pages as they are, into site/; nothing is fetched
	$(PY) -m mkdocs build --strict

clean:  ## remove caches and builds; .venv and runs/ stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
