# `make demo` and `make test` make .venv if there is none and install what they need with pip.
PYTHON ?= python3
PIP_INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-lowest lint format docs web wheel-check clean

demo: .venv/installed-demo
	.venv/bin/a2fpn demo

test: lint
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

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
	MYPY_NUM_WORKERS=2 .venv/bin/mypy
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
	if [ -f build/web/model.onnx ]; then cp -R build/web build/site/; fi
	.venv/bin/python -m pytest -m "slow or not slow" tests/test_docs.py tests/test_notebooks.py

# The page that runs a model in a browser, as static files for any host: build/web. Needs npm. Of the runtime it takes what
# WebAssembly needs; MODEL may be a checkpoint folder, PICTURES a folder of pictures to try.
MODEL ?= maskrcnn_a2fpn_lite0.nuclei
PICTURES ?= a2fpn/assets/nuclei_demo/images
RUNTIME = ort.wasm.min.mjs ort-wasm-simd-threaded.mjs ort-wasm-simd-threaded.wasm
web: .venv/installed-dev build/npm/installed
	rm -rf build/web && mkdir -p build/web
	cp docs/web/*.html docs/web/*.css docs/web/*.js docs/web/*.mjs build/web
	cp $(RUNTIME:%=build/npm/node_modules/onnxruntime-web/dist/%) build/web
	cp -R $(PICTURES) build/web/pictures && ls build/web/pictures > build/web/pictures.txt
	.venv/bin/a2fpn export $(MODEL) --output build/web/model.onnx
	@echo "Serve it: .venv/bin/python -m http.server --directory build/web"

build/npm/installed: docs/web/package.json docs/web/package-lock.json
	mkdir -p build/npm && cp docs/web/package.json docs/web/package-lock.json build/npm
	npm ci --prefix build/npm --ignore-scripts --no-audit --no-fund
	touch $@

# What a user gets from a package index: a built wheel in an empty environment, away from this folder, that predicts,
# trains, converts and publishes.
wheel-check:
	rm -rf build/wheel && mkdir -p build/wheel/empty
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	wheel=$$(echo build/wheel/*.whl) && build/wheel/venv/bin/python -m pip install --quiet --disable-pip-version-check "$$wheel[train]"
	cd build/wheel/empty && ../venv/bin/python ../../../.ci/wheel_check.py
	rm -rf build/wheel/venv build/wheel/empty

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
