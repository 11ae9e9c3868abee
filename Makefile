# make serve and make test set up what they need in .venv. Python 3.11 or later must be there and, for the fast CPU
# kernels, a C compiler. TORCH=cpu or TORCH=cuda overrides the choice of torch's build (scripts/install-torch.sh).

PYTHON ?= python3
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000
# Processes that run tests.
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt
# The environment is set up again when these change; a change of C sources rebuilds the library alone.
REQUIREMENTS := pyproject.toml constraints.txt
NATIVE := setup.py $(wildcard robuq_core/kernels/native/*)

.PHONY: serve test test-all lint loadtest docs sbom lock dist clean
.DELETE_ON_ERROR:

serve: $(VENV)/.serve $(VENV)/.native
	$(BIN)/robuq-serve --host $(HOST) --port $(PORT)

# The fast tests; `make test-all` runs the others.
test: lint $(VENV)/.native
	$(BIN)/pytest --numprocesses $(WORKERS) -m "not slow and not gpu and not browser"

# The tests that `make test` skips: slow ones, and those that need more packages (Ray, docs, peers ...).
test-all: $(VENV)/.dev-all $(VENV)/.native
	$(BIN)/pytest --numprocesses $(WORKERS) -m "slow or browser"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A short headless load test of a server that it starts itself; the reports go to loadtest/reports/.
loadtest: $(VENV)/.dev-all
	mkdir -p loadtest/reports
	$(BIN)/robuq-serve --port $(PORT) --log-level warning & server=$$!; trap "kill $$server" EXIT; \
	$(BIN)/locust -f loadtest --headless --users 8 --spawn-rate 4 --run-time 30s --only-summary \
	    --host http://127.0.0.1:$(PORT) --html loadtest/reports/latest.html && \
	$(BIN)/python -m loadtest.open_loop --host http://127.0.0.1:$(PORT) --rate 2,5,10 --duration 10

# The documentation as a site in site/; a broken link is an error.
docs: $(VENV)/.dev-all
	$(BIN)/mkdocs build --strict

# CycloneDX bill of materials of a serving installation, with the SHA-256 of every published file.
sbom: $(VENV)/.dev-all
	mkdir -p dist
	version=$$($(BIN)/python -c 'import robuq_core; print(robuq_core.__version__)'); \
	sed "s/^dynamic = .*/version = \"$$version\"/" pyproject.toml > dist/pyproject.toml
	$(BIN)/cyclonedx-py requirements --pyproject dist/pyproject.toml --output-reproducible --output-file dist/sbom.cdx.json requirements-cuda.lock
	rm dist/pyproject.toml

# Needs uv (pip install uv). requirements.lock has all but torch, for any build of torch; requirements-cuda.lock adds
# torch's default build with NVIDIA's libraries. Versions are those of constraints.txt.
lock:
	echo "# Made by make lock. Beside torch: pip install --no-deps --require-hashes -r requirements.lock" > requirements.lock
	echo "# Made by make lock. Complete: pip install --require-hashes -r requirements-cuda.lock" > requirements-cuda.lock
	echo "-r requirements.lock" >> requirements-cuda.lock
	uv pip compile --quiet --no-config --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	    --constraint constraints.txt pyproject.toml | awk '/^[^ ]/ { cuda = /^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==/ } \
	    { print >> (cuda ? "requirements-cuda.lock" : "requirements.lock") }'

dist: $(VENV)/.dev-all
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build *.egg-info robuq_core/kernels/*.so

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# The package with its library and the extras that are named.
define install
	scripts/install-torch.sh $(BIN)/python
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable '.$(1)'
	touch $(VENV)/.serve $@
endef

$(VENV)/.serve: $(VENV)/bin/python $(REQUIREMENTS)
	$(call install,)

$(VENV)/.dev: $(VENV)/bin/python $(REQUIREMENTS)
	$(call install,[dev])

$(VENV)/.dev-all: $(VENV)/bin/python $(REQUIREMENTS)
	$(call install,[dev-all])
	touch $(VENV)/.dev

# setuptools compiles nothing that is newer than its sources.
$(VENV)/.native: $(NATIVE) | $(VENV)/bin/python
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@
