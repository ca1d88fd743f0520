# `make demo` samples a video and races the kernels; `make test` runs the whole test suite. Both set up .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PROMPT ?= a red circle moving right
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml constraints.txt

# What needs a GPU: STAGES of build, tests, memcheck, initcheck, synccheck and bench (empty: all), with SELECT as pytest's
# -k for bench. Results are added to those in RESULTS. FASTVDIFF_NO_ISOLATION=1 uses PYTHON's environment as it is.
STAGES ?=
SELECT ?=
RESULTS ?= benchmarks/results

.PHONY: demo test lint bench gpu clean

demo: $(VENV)/installed
	mkdir -p demo
	$(BIN)/fastvdiff sample "$(PROMPT)" -o demo/demo.mp4 --seed 0
	$(BIN)/fastvdiff sample "$(PROMPT)" -o demo/demo.png --seed 0
	$(BIN)/fastvdiff verify

test: $(VENV)/installed-test lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests -q -n auto --maxprocesses 8 --dist loadfile --durations=15
	$(BIN)/python -m pytest benchmarks -q --benchmark-disable --device cpu

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

bench: $(VENV)/installed-test
	$(BIN)/python -m pytest benchmarks --benchmark-only -q

ifdef FASTVDIFF_NO_ISOLATION
gpu:
	FASTVDIFF_NO_ISOLATION=1 $(PYTHON) -m benchmarks.gpu $(STAGES) --results "$(RESULTS)" --select "$(SELECT)"
else
gpu: $(VENV)/installed-test
	$(BIN)/python -m benchmarks.gpu $(STAGES) --results "$(RESULTS)" --select "$(SELECT)"
endif

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
