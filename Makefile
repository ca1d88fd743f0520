# `make demo` samples a video and races the kernels; `make test` runs the whole test suite. Both set up .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PROMPT ?= a red circle moving right
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml constraints.txt

.PHONY: demo test lint bench clean

demo: $(VENV)/installed
	mkdir -p demo
	$(BIN)/fastvdiff sample "$(PROMPT)" -o demo/demo.mp4 --seed 0
	$(BIN)/fastvdiff sample "$(PROMPT)" -o demo/demo.png --seed 0
	$(BIN)/fastvdiff verify

test: $(VENV)/installed-test lint
	$(BIN)/python -m pytest tests -q --durations=15
	$(BIN)/python -m pytest benchmarks -q --benchmark-disable

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

bench: $(VENV)/installed-test
	$(BIN)/python -m pytest benchmarks --benchmark-only -q

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python $(SOURCES)
	$(PIP) install -q -c constraints.txt -e .
	touch $@

# The extra's requirements by themselves: installing ".[test]" would compile the kernels a second time.
$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	    print(*p['optional-dependencies']['test'], sep='\n')" > $(VENV)/test-requirements.txt
	$(PIP) install -q -c constraints.txt -r $(VENV)/test-requirements.txt
	touch $@

clean:
	rm -rf $(VENV) build demo runs *.egg-info fastvdiff/_C*.so
