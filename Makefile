# Every target does the set-up it needs; nothing has to be run first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.edgekit-ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow lint types imports check format browser arm64 tensorrt clean

help:      ## what can be made
	@grep -E '^[a-z0-9]+: .*##|^[a-z]+:  +##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(READY) ## a virtual environment in .venv with edgekit and all that its development needs

# torch goes first, on its own: it is the one large download, and a failure there is easy to read.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "edgekit needs Python 3.10 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev,demo]'
	@touch $@

demo: $(READY) ## export, calibrate, profile and report a small network; look at build/demo
	$(BIN)/edgekit zoo export msdnet-digits -o build/demo/digits.edgekit --overwrite
	$(BIN)/edgekit calibrate build/demo/digits.edgekit --data edgekit.zoo.digits:calibration_set --max-drop 3% --minimize latency --html build/demo/explorer.html
	$(BIN)/edgekit profile build/demo/digits.edgekit --data edgekit.zoo.digits:test_set -o build/demo/profile.json
	$(BIN)/edgekit report build/demo/profile.json -o build/demo/report.html

test: $(READY) ## the default tests, a process for each core, at most four
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

slow: $(READY) ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: $(READY) ## style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## mypy, strict
	$(BIN)/mypy

imports: $(READY) ## directions between the rooms
	$(BIN)/lint-imports

check: lint types imports test ## what a change must pass

format: $(READY) ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

browser: ## Chromium for the report's browser tests (Debian; as root)
	@if command -v chromium || command -v chromium-browser || command -v google-chrome; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends chromium; \
	else \
		echo "No Chromium here, and only root on Debian can install it this way: install chromium by hand." >&2; exit 1; \
	fi

arm64: $(READY) ## answers and decisions on an emulated ARM system (Debian; as root; an hour or so)
	$(BIN)/python tests/arm64/prove.py

tensorrt: $(READY) ## TensorRT's real bindings and builder, for its tests without a GPU; 660 MB in build/tensorrt
	$(BIN)/python tests/tensorrt/prepare.py

clean:     ## remove what was made; the environment stays
	rm -rf build dist edgekit.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache .coverage htmlcov
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
