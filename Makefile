# make serve and make test set up everything they need in .venv; nothing else has to be installed first but
# Python 3.11 or later and, for the fast CPU kernels, a C compiler.

PYTHON ?= python3
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard robuq_core/kernels/native/*)

.PHONY: serve test lint loadtest docs sbom dist clean
.DELETE_ON_ERROR:

serve: $(VENV)/.serve
	$(BIN)/robuq-serve --host $(HOST) --port $(PORT)

test: lint
	$(BIN)/pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A short headless load test of a server that it starts itself; the reports go to loadtest/reports/.
loadtest: $(VENV)/.dev
	mkdir -p loadtest/reports
	$(BIN)/robuq-serve --port $(PORT) --log-level warning & server=$$!; trap "kill $$server" EXIT; \
	$(BIN)/locust -f loadtest --headless --users 8 --spawn-rate 4 --run-time 30s --only-summary \
	    --host http://127.0.0.1:$(PORT) --html loadtest/reports/latest.html && \
	$(BIN)/python -m loadtest.open_loop --host http://127.0.0.1:$(PORT) --rate 2,5,10 --duration 10

# The documentation as a site in site/; a broken link is an error.
docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict

# CycloneDX bill of materials of the installed packages.
sbom: $(VENV)/.dev
	$(BIN)/python scripts/sbom.py --out dist/sbom.cdx.json

dist: $(VENV)/.dev
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build *.egg-info robuq_core/kernels/*.so

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: $(VENV)/bin/python $(SOURCES)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/bin/python $(SOURCES)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.serve
