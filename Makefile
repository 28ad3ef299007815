# make setup    creates .venv with all packages (the other targets do it by themselves)
# make train    sets up .venv and trains the demo on two ranks          make train CONFIG=moe_32 RANKS=4 ARGS='--set zero_stage=3'
# make test     sets up .venv and runs all tests but those marked slow
# make test-fast  tests/unit alone: no processes, no torch.distributed
# make test-all   every test that needs no GPU
# make check    linter, formatter, type checker, docstring checker, tests
# make bench    words per second beside the dense baseline and DeepSpeed's own MoE layer (19 GB of memory), and our
#               optimizer beside torch's fused Adam
# make gpu      tests marked gpu, benchmark and a short training run on CUDA -> benchmarks/results/; with an environment
#               of your own: make gpu READY= BIN=/usr/bin

CONFIG ?= lstm_moe_demo
RANKS ?= 2
EP ?= $(RANKS)
ARGS ?=
READY ?= setup
PYTHON ?= python3.11
BIN = .venv/bin
PARALLEL = -n 2 --dist worksteal
# more threads than cores make small matrices ten times slower; torchrun would set the same and warn
export OMP_NUM_THREADS ?= 1

.PHONY: setup train test test-fast test-all lint check bench gpu

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	command -v $(PYTHON) >/dev/null && $(PYTHON) -m venv .venv || python3 -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

train: setup
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) train.py $(CONFIG) --set mesh.ep=$(EP) $(ARGS)

test: setup
	$(BIN)/python -m pytest $(PARALLEL) -m 'not gpu and not slow' $(ARGS)

test-fast: setup
	$(BIN)/python -m pytest $(PARALLEL) tests/unit $(ARGS)

test-all: setup
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pydoclint -q moe_dist train.py

check: lint
	$(BIN)/python -m pytest $(PARALLEL) -m 'not gpu and not slow'

bench: setup
	$(BIN)/python benchmarks/lm.py $(ARGS)
	$(BIN)/python benchmarks/optimizer.py

gpu: $(READY)
	$(BIN)/python -c "import torch, sys; sys.exit(None if torch.cuda.is_available() else 'make gpu: no CUDA device')"
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python benchmarks/lm.py --json benchmarks/results/lm_gpu.json
	$(BIN)/python benchmarks/optimizer.py --json benchmarks/results/optimizer_gpu.json
	$(BIN)/python benchmarks/layer.py --shapes e32 e256 e1024 widenet3072 --gate --json benchmarks/results/layer_gpu.json
	$(BIN)/torchrun --standalone --nproc-per-node 1 train.py lstm_moe_demo --set steps=200 --set ds_config=bf16 --set wandb.mode=off
