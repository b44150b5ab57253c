# `make help` lists the targets. Each makes .venv when it is missing or its requirements changed.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# One thread per process: tests start several processes on few cores.
test test-latest test-lowest: export OMP_NUM_THREADS ?= 1
# What other versions of torch, Triton and Megatron-Core are tried on: the bars marked `pinned` are
# those of one compiler, and of tests/parallel the part marked `core` has to do.
CORE := tests/kernels tests/runtime tests/model \
	tests/data/images/test_image.py tests/data/loading/test_loader.py \
	tests/data/shards/test_shards.py tests/data/text/test_tokenizer.py

# Whole files go to a process each, one more than cores: many tests wait for programs and time-outs.
# `make test ARGS='-n 0 ...'` runs all in one process, as a debugger needs it.
SIDE_BY_SIDE = -n $$(( $$(getconf _NPROCESSORS_ONLN) + 1 )) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help train chat test test-slurm test-latest test-lowest lint verify clean
.PHONY: bench bench-kernels bench-data bench-convert bench-evaluation bench-planner bench-save
.PHONY: bench-train drill
.DELETE_ON_ERROR:

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12 chooses the interpreter of a new .venv; ARGS=... goes to the program"
	@echo "  (make test ARGS='tests/test_cli.py -x'), OMP_NUM_THREADS=N sets threads per process."

train: $(VENV)/.train  ## the quick start: real images, three phases, evaluation, export
	$(RUN) -m examples.quickstart.run $(ARGS)

chat: $(VENV)/.serve  ## a page to talk to the quick start's model, on http://127.0.0.1:8000
	@test -e runs/quickstart/phase3/checkpoints/latest || { echo "make train comes first" >&2; exit 1; }
	$(RUN) tools/serve.py --load runs/quickstart/phase3/checkpoints --name gmai-vl-tiny \
		--examples runs/quickstart/examples $(ARGS)

test: $(VENV)/.dev  ## all tests (those of Slurm where it is installed)
	$(RUN) -m pytest $(SIDE_BY_SIDE) $(ARGS)

test-latest: .venv-latest/.ready  ## core tests with the newest torch, Triton, megatron-core
	.venv-latest/bin/python -m pytest -m "not pinned" $(CORE) $(ARGS)
	.venv-latest/bin/python -m pytest -m core tests/parallel $(ARGS)

test-lowest: .venv-lowest/.ready  ## core tests with the lowest versions of setup.py, Python 3.11
	.venv-lowest/bin/python -m pytest -m "not pinned" $(CORE) $(ARGS)
	.venv-lowest/bin/python -m pytest -m core tests/parallel $(ARGS)

test-slurm: export OMP_NUM_THREADS ?= 1
test-slurm: $(VENV)/.dev  ## the Slurm template on a real Slurm (Debian: slurm-wlm munge; as root)
	@command -v sbatch > /dev/null || { echo "apt-get install slurm-wlm munge" >&2; exit 1; }
	$(RUN) -m pytest -m slurm tests/cluster $(ARGS)

lint: $(VENV)/.dev  ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

verify: $(VENV)/.dev  ## the quick start's export against the checkpoint that it came from
	$(RUN) tools/convert_checkpoint.py verify runs/quickstart/phase3/checkpoints runs/quickstart/hf $(ARGS)

bench:  ## all benchmarks, results under runs/bench, whichever bar is missed
	$(MAKE) --keep-going bench-kernels bench-data bench-convert bench-evaluation bench-save \
		bench-planner bench-train

bench-kernels: $(VENV)/.bench  ## the fused kernels against torch and others
	$(RUN) benchmarks/kernels.py $(ARGS)

bench-data: $(VENV)/.bench  ## making shards, loader, packing and planning
	$(RUN) benchmarks/data_build.py
	$(RUN) benchmarks/data.py $(ARGS)

bench-planner: $(VENV)/.dev  ## the planner against dry runs, and these against real tensors
	$(RUN) benchmarks/planner.py $(ARGS)

bench-train: $(VENV)/.dev  ## training against transformers, layouts against one process
	$(RUN) benchmarks/train.py $(ARGS)

bench-convert: $(VENV)/.dev  ## conversion both ways against a plain copy, and its memory
	$(RUN) benchmarks/convert.py $(ARGS)

bench-evaluation: $(VENV)/.dev  ## scoring, the search for leakage, and the server under load
	$(RUN) benchmarks/evaluation.py
	$(RUN) benchmarks/server.py $(ARGS)

bench-save: $(VENV)/.dev  ## saving from a copy against saving at once: waiting and memory
	$(RUN) benchmarks/save.py $(ARGS)

drill: $(VENV)/.dev  ## break a run on purpose in 46 places (10 to 20 minutes; as root: all)
	OMP_NUM_THREADS=1 $(RUN) -m benchmarks.drill $(ARGS)

clean:  ## remove what the targets above made, but neither .venv nor other runs
	rm -rf runs/quickstart runs/bench runs/drill build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/.train: $(addprefix requirements/,cpu.txt quickstart.txt images.txt) setup.py pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements/cpu.txt -r requirements/quickstart.txt
	$(RUN) -m pip install --quiet --no-deps -r requirements/images.txt
	$(RUN) -m pip install --quiet --no-deps --editable .
	touch $@

$(VENV)/.serve: $(VENV)/.train requirements/serve.txt
	$(RUN) -m pip install --quiet -r requirements/serve.txt
	touch $@

$(VENV)/.bench: $(VENV)/.dev requirements/bench.txt
	$(RUN) -m pip install --quiet --no-deps -r requirements/bench.txt
	touch $@

$(VENV)/.dev: $(VENV)/.serve requirements/dev.txt
	$(RUN) -m pip install --quiet -r requirements/dev.txt
	touch $@

.venv-latest/.ready: requirements/latest.txt
	rm -rf .venv-latest && $(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install --quiet -r $<
	.venv-latest/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

.venv-lowest/.ready: requirements/lowest.txt
	$(PYTHON) -c 'import sys; sys.version_info[:2] == (3, 11) or sys.exit("Python 3.11 is needed: make PYTHON=...")'
	rm -rf .venv-lowest && $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet -r $<
	.venv-lowest/bin/python -m pip install --quiet --no-deps --editable .
	touch $@
