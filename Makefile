# LayerFed. `make` alone lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Nothing phones home, nothing is reinstalled for a run.
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export RAY_USAGE_STATS_ENABLED = 0
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help setup run test test-slow chromium lint lock docs bench table dist deploy-demo faults kills mutants clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

# One stamp a set of extras: `make run` need not install what only the tests use. Versions are those that
# were tested with this Python, where it has a file of them.
MADE_BY = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
TESTED = $(wildcard requirements/py$(shell $(MADE_BY) -c 'import sys; print("%d%d" % sys.version_info[:2])').txt)
PINNED = $(TESTED:%=--constraint %)
# uv installs several times faster than pip. It does not read pip's settings: for an index other than PyPI
# set UV_DEFAULT_INDEX.
INSTALL = $(BIN)/uv pip install --quiet --python $(BIN)/python $(PINNED) --editable

$(VENV)/.installed: pyproject.toml $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "LayerFed needs Python 3.11 or newer: make PYTHON=python3.12 …"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PINNED) uv
	$(INSTALL) ".[deploy,simulation]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) ".[test,lint,docs]"
	@touch $@

setup: $(VENV)/.installed ## create .venv with the layerfed command

run: $(VENV)/.installed ## the main job: ten clients fine-tune a pretrained ViT, by the method and by three rules
	$(BIN)/layerfed compare conf/scanners.toml --strategies ilp,top,random,full --budgets half-normal \
		--seeds 0 --jobs 2 --dir runs/first

# Tests of a module share what they set up, and stay in one process.
test: $(VENV)/.installed-dev ## set up and pass the tests, on all cores
	$(BIN)/python -m pytest -q -m "not slow" --numprocesses auto --maxprocesses 8 --dist loadscope

test-slow: $(VENV)/.installed-dev chromium ## pass the tests that start deployments, Ray, many processes or a browser, or kill
	$(BIN)/python -m pytest -q -m slow --numprocesses auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder

# The browser that pages are tested in. It comes from the system, never from a test.
chromium:
	@for name in chromium chromium-browser google-chrome; do command -v $$name && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get; \
		then apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; \
		else echo "the tests of pages need Chromium: apt-get install chromium fonts-dejavu-core"; exit 1; \
	fi

# On a busy machine mypy's processes may not find each other in time; one process always works.
lint: $(VENV)/.installed-dev ## ruff, mypy --strict, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers auto || $(BIN)/mypy
	$(BIN)/lint-imports

lock: $(VENV)/.installed ## write requirements/ from pyproject.toml (newest versions: UPGRADE=--upgrade)
	for version in 3.11 3.12 3.13; do \
		$(BIN)/uv pip compile --quiet $(UPGRADE) --no-python-downloads --python-version $$version --all-extras --no-annotate \
			--custom-compile-command "make lock" pyproject.toml \
			--output-file requirements/py$$(echo $$version | tr -d .).txt || exit; \
	done

$(VENV)/.installed-docs: $(VENV)/.installed
	$(INSTALL) ".[docs]"
	@touch $@

docs: $(VENV)/.installed-docs ## the documentation site, in build/docs/index.html; LINKS=1 checks links to other sites as well
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs build/docs
	$(if $(LINKS),$(BIN)/sphinx-build --builder linkcheck --quiet docs build/links)

generate: $(VENV)/.installed ## renew what follows from the code: pyproject.toml, docs/configuration.md, docs/cli.md
	$(BIN)/python -m scripts.generate

dist: $(VENV)/.installed ## wheel and source distribution for PyPI, in dist/ (REPOSITORY=https://…, where links lead)
	@test -n "$(REPOSITORY)" || { echo "say where the repository is: make dist REPOSITORY=https://…"; exit 1; }
	$(BIN)/python -m scripts.dist --repository "$(REPOSITORY)"
	$(BIN)/uv tool run twine check --strict dist/*

table: $(VENV)/.installed ## every strategy on digits, R = 1 and 2, three seeds
	$(BIN)/layerfed compare conf/default.toml --dir runs/digits-table

bench: $(VENV)/.installed-dev ## time selection (all peers at full size: --part compare as well)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/selection.py --time-limit 20 --part random --part costs --part scaling

deploy-demo: $(VENV)/.installed ## four nodes with TLS and authentication on loopback, against the simulation
	$(BIN)/layerfed deploy demo

faults: $(VENV)/.installed ## what faults do to real processes on loopback (half an hour)
	$(BIN)/python benchmarks/faults.py

kills: $(VENV)/.installed ## kill the server of a real run twenty times, resume it, and compare (a quarter of an hour)
	$(BIN)/python benchmarks/kills.py

mutants: $(VENV)/.installed-dev ## a sample of changes to the core that no test notices (an hour; MUTANTS='--only aggregation')
	$(BIN)/python -m scripts.mutants $(MUTANTS)

clean: ## remove the environment and caches (never your runs)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
