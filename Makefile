# `make demo` and `make test` make .venv if there is none and install what they need with pip.
PYTHON ?= python3
PIP_INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint format wheel-check clean

demo: .venv/installed-demo
	.venv/bin/a2fpn demo

test: lint
	.venv/bin/python -m pytest -n 2

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python -m benchmarks.tables --check

format: .venv/installed-dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

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
