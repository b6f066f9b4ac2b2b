PYTHON ?= python3
BIN := .venv/bin
# Images of containers like to set it; the tests start hundreds of processes, each would compile everything anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-ecosystem test-destinations chaos check format coverage bench bench-full bench-instructions bench-order bench-instrumentation docs test-matrix clean programs brokers .venv

help:  ## Show this help
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / { printf "  make %-22s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv  ## Orders under traffic, a relay killed in the middle, and the proof that nothing was lost
	@$(BIN)/python examples/demo.py

test: .venv programs  ## Run the tests of the library itself; they start their own PostgreSQL
	@$(BIN)/pytest

test-ecosystem: .venv programs  ## Run the tests of frameworks, instrumentation, command line, docs, examples, each extra alone
	@$(BIN)/pytest tests/ecosystem

test-destinations: .venv programs brokers  ## Run the contract of every destination against its real broker
	@$(BIN)/pytest tests/destinations

chaos: .venv programs  ## Faults of every kind for two minutes, then the proof; for more: make chaos CHAOS='--seconds 1800'
	@$(BIN)/python -m tests.chaos $(CHAOS)

check: .venv  ## What CI checks: format, lint, types, and the direction of the imports
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: .venv  ## Format the code, and repair what the linter can
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

coverage: .venv  ## Run the tests and show which lines they never reach
	@$(BIN)/coverage erase
	@$(BIN)/coverage run -m pytest
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report

bench: .venv  ## Measure it beside the work written by hand, pgbench and five other packages; less than two minutes
	@$(BIN)/python -m benchmarks.bench --short

bench-full: .venv  ## The same with the whole matrix, into docs/benchmarks; less than twenty minutes
	@$(BIN)/python -m benchmarks.bench

bench-instructions: .venv  ## Count the instructions of a message by Valgrind, into docs/benchmarks; about twenty minutes
	@$(BIN)/python -m benchmarks.instructions

bench-order: .venv  ## Measure what an order costs, with 1, 2 and 4 relay processes; about four minutes
	@$(BIN)/python benchmarks/order.py

bench-instrumentation: .venv  ## Measure what it costs to be watched; about a minute
	@$(BIN)/python -m benchmarks.instrumentation

docs: .venv  ## Build the documentation into site/; a broken link is an error
	@$(BIN)/zensical build --clean --strict

test-matrix: .venv  ## Run the tests on PostgreSQL 14 to 18, and on Python 3.11 to 3.13
	@$(BIN)/python tests/matrix.py --python 3.11 3.12 3.13

clean:  ## Remove what the other targets made
	rm -rf .venv .bench .cache .coverage .coverage.* .hypothesis .import_linter_cache .matrix .mypy_cache .pytest_cache .ruff_cache build dist htmlcov site

# Two programs that are no Python packages: one promise is kept through PgBouncer, and libfaketime sets the clock of a
# server. Root installs them; others skip that test, and that fault.
programs:
	@{ command -v pgbouncer && ls /usr/lib/*/faketime/libfaketime.so.1; } >/dev/null 2>&1 || \
		[ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
		{ echo 'Installing PgBouncer and libfaketime …'; export DEBIAN_FRONTEND=noninteractive; \
		apt-get update -qq && apt-get install -qq --yes --no-install-recommends pgbouncer libfaketime >/dev/null; }

# The one broker that is no Python package; Debian would start it at once, on all addresses.
brokers:
	@test -x /usr/lib/rabbitmq/bin/rabbitmq-server || \
		[ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
		{ echo 'Installing RabbitMQ …'; export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1; \
		apt-get update -qq && apt-get install -qq --yes --no-install-recommends rabbitmq-server >/dev/null; }

.venv: .venv/.ready  ## Install everything into .venv; the targets above do it by themselves

# The stamp comes last, so an installation that was interrupted starts anew. The certificates of the system: behind
# a company's proxy its own are not enough.
.venv/.ready: requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo 'Python 3.11 or newer is needed, and $(PYTHON) is not: try `make PYTHON=python3.13 …`' >&2; exit 1; }
	@echo 'Installing into .venv …'
	@rm -rf .venv
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@UV_SYSTEM_CERTS=1 $(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements-dev.txt -e .
	@touch $@
