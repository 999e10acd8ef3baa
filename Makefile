# Each target does its own set-up, from nothing but Python >= 3.11 and make.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# By environment as well as by -c: what pip installs to build this package is pinned too.
SGLANG := .venv-sglang
WEB := .venv-web
INSTALL := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := ghostvis_cli commands profiles tests tools benchmarks
# The real SGLang, where it runs without a GPU. Elsewhere its tests skip and the summary says why.
REAL_SGLANG := $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m))

.PHONY: help
help:  ## Explain the targets (this list)
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[local,serve]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(INSTALL) -e '.[local,serve,dev]'
	@touch $@

.PHONY: demo
demo: $(VENV)/.run  ## Ask the built-in model what is in an image
	$(BIN)/ghostvis generate --source demo --temperature 0 --stats \
		--image ghostvis_cli/demo/three-shapes.jpg "What is in this picture?"

# 620 MB to download and 2.7 GB on disk, once.
$(SGLANG)/.ready: $(wildcard tests/sglang/runtime/* tests/sglang/runtime/*/*.py)
	@echo "setting up SGLang for its tests: a few minutes, once"
	rm -rf $(SGLANG)
	bash tests/sglang/runtime/setup.sh $(SGLANG) $(PYTHON)
	@touch $@

# Again when the entry points may have changed.
$(SGLANG)/.plugin: $(SGLANG)/.ready pyproject.toml
	$(SGLANG)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# Gradio wants an older Pillow than the one that is pinned: an environment of its own, on top of the other.
$(WEB)/.ready: $(VENV)/.dev tests/web/requirements.lock
	rm -rf $(WEB)
	$(PYTHON) -m venv $(WEB)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> $$($(WEB)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	$(WEB)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/web/requirements.lock -e .
	@touch $@

.PHONY: test
test: quick $(if $(REAL_SGLANG),sglang)  ## Run the tests, on every core; on Linux x86-64 with the real SGLang

.PHONY: quick
quick: $(VENV)/.dev  ## Run the tests that need no SGLang (some seven minutes)
	$(BIN)/python -m pytest -q -n auto --dist worksteal --ignore tests/web $(if $(REAL_SGLANG),--ignore tests/sglang)

.PHONY: web
web: $(WEB)/.ready  ## Run the tests of the chat's page, those in a browser where Chromium is installed
	$(WEB)/bin/python -m pytest -q -n 2 --dist loadgroup -m "not slow" tests/web

.PHONY: web-all
web-all: $(WEB)/.ready $(SGLANG)/.plugin  ## Run them all: the page on the real SGLang, killed and started again
	$(WEB)/bin/python -m pytest -q -n 2 --dist loadgroup tests/web

.PHONY: sglang
sglang: $(SGLANG)/.plugin  ## Run the tests against the real SGLang, but for its slow starts and ends
	$(SGLANG)/bin/python -m pytest -q -n 2 --dist loadgroup -m "not slow" tests/sglang

.PHONY: sglang-all
sglang-all: $(SGLANG)/.plugin  ## Run them all: servers started, killed and restarted, replicas behind a gateway
	$(SGLANG)/bin/python -m pytest -q -n 2 --dist loadgroup tests/sglang

CLIENTS := .venv-clients
CLIENT_TESTS := -q --noconftest -p no:cacheprovider -c /dev/null --rootdir . -W ignore -rs tests/clients

# Environments of their own: nothing here wants what other people's clients want.
$(CLIENTS)/.ready: pyproject.toml tests/clients/constraints.txt tests/clients/instructor.txt
	$(PYTHON) -m venv $(CLIENTS) && $(CLIENTS)/bin/python -m pip install --quiet --upgrade pip
	$(CLIENTS)/bin/python -m pip install --quiet -c tests/clients/constraints.txt '.[clients]'
	$(PYTHON) -m venv $(CLIENTS)-instructor
	$(CLIENTS)-instructor/bin/python -m pip install --quiet -r tests/clients/instructor.txt
	if command -v npm > /dev/null; then npm install --silent --prefix tests/clients/javascript; fi
	@touch $@

.PHONY: clients
clients: $(VENV)/.run $(CLIENTS)/.ready  ## Try other people's clients; GHOSTVIS_CLIENTS_URL names a server that runs
	GHOSTVIS_CLIENTS_SERVER=$(BIN)/ghostvis $(CLIENTS)/bin/python -m pytest $(CLIENT_TESTS) -k "not instructor"
	GHOSTVIS_CLIENTS_SERVER=$(BIN)/ghostvis $(CLIENTS)-instructor/bin/python -m pytest $(CLIENT_TESTS) -k instructor

# A wheel and an sdist, and what they install: each extra in a fresh environment of each Python.
PYTHONS ?= $(PYTHON)
EXTRAS := core local convert hub serve local,serve,hub
.PHONY: dist
dist: $(VENV)/.dev  ## Build wheel and sdist, and install each extra fresh; PYTHONS="python3.11 python3.13"
	rm -rf dist && $(BIN)/python -m build --outdir dist .
	$(BIN)/python -m tools.try_wheel --pythons $(PYTHONS) --extras $(EXTRAS)

.PHONY: check
check: lint types test web  ## Lint, types and tests: what a commit must pass

.PHONY: lint
lint: $(VENV)/.dev  ## Look for faults and unformatted code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: types
types: $(VENV)/.dev  ## Check types, strictly
	$(BIN)/mypy

.PHONY: format
format: $(VENV)/.dev  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: docs
docs: $(VENV)/.dev  ## Write what the docs have from the code: option tables, the schema of profiles
	$(BIN)/python -m tools.option_tables
	$(BIN)/python -m tools.shipped
	$(BIN)/python -m ghostvis_cli.profile > docs/profile.schema.json

.PHONY: bench
bench: $(VENV)/.dev  ## Measure this project against its targets (minutes; see docs/measurements.md)
	$(BIN)/python -m benchmarks

.PHONY: clean
clean:  ## Remove the environment and everything that was built
	rm -rf $(VENV) $(SGLANG) $(CLIENTS) $(CLIENTS)-instructor $(WEB) tests/clients/javascript/node_modules build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
