# Everything a developer runs. `make` alone lists the targets; each makes .venv when it is missing or out of date.
#
#   PYTHON=python3.13 VENV=.venv-3.13   another Python, in an environment of its own
#   PYTEST_ARGS="-k codec -n 0"         passed to pytest; -n 0 runs the tests in one process
#   BENCH_ARGS="--only langgraph"       passed to the benchmark; --help lists what there is

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
BENCH_ARGS ?=

# Absolute, since some steps run in core/; quoted where it is used, since the path may hold spaces.
BIN := $(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))/bin
LOCK := core/requirements-dev.lock
DEPS := $(VENV)/.stamp-dependencies
READY := $(VENV)/.stamp-ready

# Of these, what exists: a fresh repository has no examples yet.
SOURCES := $(wildcard core/framework core/tests tools examples benchmarks)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: test
test: lint unit ## all checks and the tests, as CI does

.PHONY: unit
unit: $(READY) ## the tests alone
	@echo "==> pytest"
	@cd core && "$(BIN)/python" -m pytest --numprocesses auto --dist worksteal $(PYTEST_ARGS)

.PHONY: test-slow
test-slow: $(READY) ## the slow tests: random kills and long property tests
	@echo "==> pytest, slow tests"
	@cd core && "$(BIN)/python" -m pytest -m slow --timeout 3600 $(PYTEST_ARGS)

.PHONY: test-faults
test-faults: $(READY) ## the fault suite, 10,000 kills and more; FAULTS_KILLS=500 for less, SEED=... repeats one
	@echo "==> fault suite"
	@cd core && "$(BIN)/python" -m tests.faults.suite

.PHONY: demo
demo: $(READY) ## an agent killed in the middle of its work, and resumed
	@"$(BIN)/python" examples/research_agent/demo.py

.PHONY: bench-quick
bench-quick: $(READY) ## what a durable step costs here, beside raw SQLite
	@"$(BIN)/python" benchmarks/steps.py

.PHONY: bench
bench: $(READY) ## every workload for us, the raw stores and the peers; tables and plots into docs/benchmarks
	@"$(BIN)/python" benchmarks/compare.py $(BENCH_ARGS)

.PHONY: bench-scale
bench-scale: $(READY) ## 100,000 runs and 5 million checkpoints in one SQLite file (about 4 GB of disk for a while)
	@"$(BIN)/python" benchmarks/scale.py $(BENCH_ARGS)

.PHONY: lint
lint: $(READY) ## ruff, mypy --strict, import-linter and the file-size check
	@echo "==> ruff check"
	@"$(BIN)/ruff" check --quiet $(SOURCES)
	@echo "==> ruff format --check"
	@"$(BIN)/ruff" format --quiet --check $(SOURCES) || \
		{ "$(BIN)/ruff" format --check $(SOURCES); echo "Run 'make format'."; exit 1; }
	@echo "==> mypy --strict"
	@"$(BIN)/mypy" --no-error-summary --config-file core/pyproject.toml core/framework core/tests tools
	@echo "==> lint-imports"
	@cd core && "$(BIN)/lint-imports" --no-logo
	@echo "==> file sizes and docstrings"
	@"$(BIN)/python" tools/check_sizes.py

.PHONY: format
format: $(READY) ## sort imports and format the code in place
	@"$(BIN)/ruff" check --quiet --select I --fix $(SOURCES)
	@"$(BIN)/ruff" format $(SOURCES)

.PHONY: lock
lock: $(READY) ## resolve the dependencies anew into core/requirements-dev.lock
	@echo "==> resolving $(LOCK)"
	@"$(BIN)/python" -m pip install -qq --disable-pip-version-check uv
	@cd core && "$(BIN)/uv" pip compile pyproject.toml --extra dev --universal --python-version 3.11 --upgrade \
		--generate-hashes --no-emit-index-url --no-emit-find-links --no-emit-package surefoot \
		--custom-compile-command "make lock" --quiet --output-file requirements-dev.lock
	@cd benchmarks/peers && for name in *.in; do \
		echo "==> resolving benchmarks/peers/$${name%.in}.lock"; \
		"$(BIN)/uv" pip compile "$$name" --universal --python-version 3.11 --upgrade --generate-hashes \
			--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" --quiet \
			--output-file "$${name%.in}.lock" || exit 1; \
	done

.PHONY: clean
clean: ## remove .venv, caches and builds
	@rm -rf .venv .venv-* build dist core/build core/dist .mypy_cache .ruff_cache .hypothesis \
		core/.mypy_cache core/.ruff_cache core/.pytest_cache core/.hypothesis core/.import_linter_cache .import_linter_cache
	@find core tools examples benchmarks -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# Made from nothing, so that nothing is left of an earlier lock or of an interrupted install.
$(DEPS): $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "This needs Python 3.11 or newer; '$(PYTHON)' is missing or older:" \
			"$$($(PYTHON) --version 2>&1 | head -n 1)"; \
		echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' cannot make virtual environments: it lacks the modules venv or ensurepip."; \
		echo "On Debian and Ubuntu: apt install python3-venv. Or name another Python: make PYTHON=... $(MAKECMDGOALS)"; \
		exit 1; }
	@echo "==> $(VENV): $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear "$(VENV)"
	@echo "==> installing $(LOCK)"
	@"$(BIN)/python" -m pip install -qq --disable-pip-version-check --require-hashes -r $(LOCK)
	@touch $@

# The build backend is pinned in the lock as well, hence no isolated build, which would fetch one unpinned.
$(READY): $(DEPS) core/pyproject.toml
	@echo "==> installing surefoot from core/"
	@"$(BIN)/python" -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable core
	@touch $@
