# Each target makes .venv where it is missing and installs what it needs; the second run is quick.
# PYTHON chooses the interpreter, ARGS goes to what the target runs: make test ARGS="-k lease -x"

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
TREE := build/tree
# The oldest release that is supported, beside the newest, which .venv has.
OLD_DASK := 2026.7.1
OLD_TESTS ?= tests/integration

.PHONY: help demo test test-old old-dask lint bench chaos wheel clean

help:
	@echo "make demo    a cluster whose scheduler is killed and which goes on"
	@echo "             ARGS=\"--store s3://bucket/prefix\" or gs://: with its journal there"
	@echo "make test    unit, integration and short chaos tests, with coverage over all processes"
	@echo "make test-old  contract, seam and integration tests on the oldest distributed that is supported"
	@echo "make lint    ruff, mypy --strict, layers"
	@echo "make bench   each benchmark beside stock Dask"
	@echo "make chaos   random faults with an oracle, minutes long"
	@echo "make wheel   build the wheel into dist/ and check what is in it"
	@echo "make clean   remove what these made; .venv stays"

demo: .venv/.stamp-demo $(if $(findstring s3://,$(ARGS)),.venv/.stamp-store-s3) $(if $(findstring gs://,$(ARGS)),.venv/.stamp-store-gcs)
	$(BIN)/python -m dask_resilience.chaos.demo $(ARGS)

test: .venv/.stamp-test
	$(BIN)/python .ci/measured_tests.py $(ARGS)

test-old: .venv-old/.stamp
	.venv-old/bin/python -c "import distributed; assert distributed.__version__ == '$(OLD_DASK)', distributed.__version__"
	.venv-old/bin/python -m pytest -n 2 --dist loadfile tests/contract tests/seam $(OLD_TESTS) $(ARGS)

old-dask:
	@echo $(OLD_DASK)

lint: .venv/.stamp-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/installed_tree.py $(TREE)
	cd $(TREE) && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p dask_resilience
	cd $(TREE) && ../../$(BIN)/lint-imports --config ../../pyproject.toml --cache-dir ../../.import_linter_cache

bench: .venv/.stamp-test
	@set -e; for name in scheduler_cost failover journal_bytes commit_latency snapshots stores; do \
		echo "== $$name"; $(BIN)/python -m benchmarks.$$name $(ARGS); done

chaos: .venv/.stamp-test
	$(BIN)/python -m dask_resilience.sim --seeds 10000
	$(BIN)/python -m dask_resilience.chaos.soak --kills 100 $(ARGS)
	$(BIN)/python -m pytest -m long

wheel: .venv/.stamp-test
	rm -rf dist build/lib build/bdist.*
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	$(BIN)/python .ci/wheel_contents.py dist/*.whl

clean:
	rm -rf build dist .demo coverage-report .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -rf dask-scratch-space dask-worker-space .coverage .coverage.* *.egg-info
	find . -path ./.venv -prune -o -path ./.venv-old -prune -o -name __pycache__ -type d -print | xargs rm -rf

# Stamps: done once, and again when the dependencies change.

.venv/.stamp-made:
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) found; install Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "make: $(PYTHON) is Python %d.%d, this project needs 3.11 or newer; set PYTHON=" % v[:2])'
	$(PYTHON) -m venv .venv
	@touch $@

.venv-old/.stamp: pyproject.toml
	$(PYTHON) -m venv .venv-old
	@echo '*' >.venv-old/.gitignore
	.venv-old/bin/python -m pip install --quiet --disable-pip-version-check \
		"dask==$(OLD_DASK)" "distributed==$(OLD_DASK)" --editable ".[demo,test]"
	@touch $@

.venv/.stamp-demo: .venv/.stamp-made pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[demo]"
	@touch $@

# What the demo needs besides, to reach a store in a cloud.
.venv/.stamp-store-%: .venv/.stamp-made pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[demo,$*]"
	@touch $@

# The tests shuffle dataframes, hence the demo's extra.
.venv/.stamp-test: .venv/.stamp-made pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[demo,test]"
	@touch $@

# mypy reads the types of what the tests and the demo import.
.venv/.stamp-lint: .venv/.stamp-made pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[demo,lint,test]"
	@touch $@
