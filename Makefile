# `make demo` and `make test` make .venv if there is none and install what they need with pip.
PYTHON ?= python3
PIP_INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-lowest lint format docs wheel-check clean

demo: .venv/installed-demo
	.venv/bin/a2fpn demo

test: lint
	.venv/bin/python -m pytest -n 2

# In an environment that somebody made, such as one with the lowest versions that pyproject.toml declares: what touches
# other packages' interfaces.
PYTHON_FOR_TESTS ?= .venv/bin/python
LOWEST = thresholds factory checkpoint preprocess masks heads necks inference recipes
LOWEST_RUNS = learns_evaluates or counts_steps or warms_up or each_optimizer
test-lowest:
	$(PYTHON_FOR_TESTS) -m pytest $(LOWEST:%=tests/test_%.py)
	$(PYTHON_FOR_TESTS) -m pytest tests/test_train.py -k "$(LOWEST_RUNS)"
	$(PYTHON_FOR_TESTS) -m pytest tests/test_cli.py -k "info or list"

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/codespell
	.venv/bin/deptry .
	.venv/bin/python -m benchmarks.tables --check

format: .venv/installed-dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# The site, strictly: a dead link, an unresolved name of the reference or a page out of date fails. Notebooks run.
docs: .venv/installed-dev
	.venv/bin/python -m benchmarks.tables --check
	.venv/bin/mkdocs build --strict
	.venv/bin/python -m pytest -m "slow or not slow" tests/test_docs.py tests/test_notebooks.py

# What a user gets from a package index: a built wheel in an empty environment, away from this folder, that predicts,
# trains, converts and publishes.
wheel-check: .venv/installed-dev
	rm -rf build/wheel && mkdir -p build/wheel
	.venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	wheel=$$(echo build/wheel/*.whl) && build/wheel/venv/bin/python -m pip install --quiet --disable-pip-version-check "$$wheel[train]"
	mkdir build/wheel/empty && cd build/wheel/empty && ../venv/bin/python ../../../.ci/wheel_check.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed-demo: pyproject.toml | .venv/bin/python
	$(PIP_INSTALL) --editable .
	touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(PIP_INSTALL) --editable ".[dev]"
	touch $@ .venv/installed-demo

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
