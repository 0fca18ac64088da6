# `make` sets up .venv, `make demo` fine-tunes a real model, `make test` runs the tests.
PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints/cpu.txt
EXTRAS      ?= launch,demo,sweep,trl,test
PYTEST_ARGS ?=
# Processes that share the tests; a module's tests stay together, since they share what is expensive to build.
WORKERS     ?= auto
BENCH_ARGS  ?=

BIN         := $(VENV)/bin
STAMP       := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench

# DeepSpeed compiles ops at run time with the ninja that it finds on PATH.
export PATH := $(abspath $(BIN)):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: venv demo test test-families test-kernels test-mutants test-late-device test-slow test-report test-commands test-ranks test-slurm test-fault test-deepspeed test-gpu bench-gpu bench-optimizer bench-quality bench-quality-full bench-ranks bench-checkpoints bench-speed bench-plan quality-page results lint format clean

venv: $(STAMP)

# Written last, so that an interrupted installation is repeated.
$(STAMP): setup.cfg pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[$(EXTRAS)]' -c $(CONSTRAINTS)
	touch $@

demo: $(STAMP)
	$(BIN)/python launch/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest tests -x -q -n $(WORKERS) --dist loadscope -m "not slow and not families and not ranks and not cluster and not fault and not browser and not commands" $(PYTEST_ARGS)

# What an adapter does, for every family of models; writes docs/families.md.
test-families: $(STAMP)
	$(BIN)/python -m pytest tests/integration/test_families.py tests/integration/test_lora_base.py -q \
		-m behaviour --families-table docs/families.md $(PYTEST_ARGS)

# What first compiles DeepSpeed's own operators, a minute each.
test-slow: $(STAMP)
	$(BIN)/python -m pytest tests -x -q -m slow $(PYTEST_ARGS)

# A report in a browser: light, dark, on a phone. It installs nothing; where a browser or its driver is missing it says what to
# install: Chromium (Debian: apt-get install chromium) and the extra `browser`.
test-report: $(STAMP)
	$(BIN)/python -m pytest tests/browser -q -rs -m browser $(PYTEST_ARGS)

# Every command of the documents, as it is written, and every benchmark in its quick form; a quarter of an hour.
test-commands: $(BENCH_STAMP)
	$(BIN)/python -m pytest tests/commands -q -rs -m commands $(PYTEST_ARGS)

# Several ranks in full: parity of all settings, faults, memory; several hosts, where the packages for them are there.
test-ranks: $(STAMP)
	$(BIN)/python -m pytest tests/ranks tests/cluster -q -m "ranks or cluster" $(PYTEST_ARGS)

# Sweeps on a Slurm that the tests start over two hosts and stop: preemption, requeues, a killed sweep (five minutes; root).
test-slurm: $(STAMP)
	$(BIN)/python -m pytest tests/cluster/test_sweep_on_slurm.py tests/cluster/test_batch_scripts.py -q -rs -m cluster $(PYTEST_ARGS)

# Saves that are killed at every phase, on disks that are full; as root, who may mount small ones.
test-fault: $(STAMP)
	$(BIN)/python -m pytest tests/fault -q -m fault $(PYTEST_ARGS)

# DeepSpeed's own tests with MeftEngine in its engine's place; DEEPSPEED is a git checkout of the installed version.
test-deepspeed: $(STAMP)
	@test -n "$(DEEPSPEED)" || { echo 'say where: make test-deepspeed DEEPSPEED=path/to/a/DeepSpeed/checkout'; exit 2; }
	$(BIN)/python -m tests.deepspeed_suite.run "$(DEEPSPEED)"

# Triton's kernels without a GPU: what they compute, by Triton's interpreter, and what they take when they are compiled for
# five GPUs; writes docs/kernels.md.
test-kernels: $(STAMP)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels/interpreted -x -q -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)
	$(BIN)/python -W ignore::UserWarning:triton.knobs -m tests.kernels.compiled.resources docs/kernels.md

# Whether tests notice kernels, and waits for a device, that have been broken on purpose, one at a time; ten minutes.
test-mutants: $(STAMP)
	$(BIN)/python -m tests.kernels.mutants
	$(BIN)/python -m tests.late_mutants

# The tests of the engine with every model on a device whose copies are as late as they may be; a quarter of an hour.
test-late-device: $(STAMP)
	$(BIN)/python -m pytest tests/integration tests/unit -x -q -n $(WORKERS) --dist loadscope --late-device \
		-m "not slow and not families and not ranks and not cluster and not fault and not browser and not commands and not host_only" $(PYTEST_ARGS)

# The kernels and the engine with its model on a GPU. Set CONSTRAINTS to a file that allows your build of torch (/dev/null: any).
test-gpu: $(STAMP)
	$(BIN)/python -m pytest tests/gpu -x -q $(PYTEST_ARGS)

# What plots need is only installed for them.
$(BENCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -e '.[bench]' -c $(CONSTRAINTS)
	touch $@

# The row optimizer beside DeepSpeed's and torch's; results go to benchmarks/results (see benchmarks/README.md).
bench-optimizer: $(BENCH_STAMP)
	$(BIN)/python benchmarks/optimizer.py $(BENCH_ARGS)

# Everything that only a GPU can tell, in stages of less than ten minutes each; BENCH_ARGS names some, or --tiny, which needs
# no GPU. Set CONSTRAINTS as for test-gpu.
bench-gpu: $(BENCH_STAMP)
	$(BIN)/python benchmarks/gpu.py $(BENCH_ARGS)

# What adapters learn and forget beside LoRA and a dense adapter; an hour and a half on two cores. It goes on where it stopped.
bench-quality: $(BENCH_STAMP)
	$(BIN)/python benchmarks/quality.py $(BENCH_ARGS)

# With 1,500 facts and all ablations besides; several hours.
bench-quality-full: $(BENCH_STAMP)
	$(BIN)/python benchmarks/quality.py --full $(BENCH_ARGS)

# What several ranks exchange in a step, beside a dense all-reduce of the same adapter; a few minutes.
bench-ranks: $(BENCH_STAMP)
	$(BIN)/python benchmarks/ranks.py $(BENCH_ARGS)

# Seconds and memory of saving, loading and exporting 4 GB of rows; ten minutes, 20 GB of memory and 30 of disk.
bench-checkpoints: $(BENCH_STAMP)
	$(BIN)/python benchmarks/checkpoints.py $(BENCH_ARGS)

# A training step beside the frozen base, a dense adapter under ZeRO-Offload and LoRA; half an hour, 22 GB of memory.
bench-speed: $(BENCH_STAMP)
	$(BIN)/python benchmarks/step.py $(BENCH_ARGS)

# What `meft-engine plan` says of six runs, beside what they take; ten minutes, 8 GB of memory.
bench-plan: $(BENCH_STAMP)
	$(BIN)/python benchmarks/plan.py $(BENCH_ARGS)

# docs/quality.md, from the results of the benchmarks of quality.
quality-page: $(STAMP)
	$(BIN)/python benchmarks/quality_page.py

# docs/results.md, from all results.
results: $(STAMP)
	$(BIN)/python benchmarks/results_page.py

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
