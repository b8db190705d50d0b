# Every target makes its own virtual environment in .venv and installs what it needs; a second call reuses it.
PYTHON ?= python3
BIN := .venv/bin
# OpenMP threads that spin while they wait would slow down other programs on the machine
export OMP_WAIT_POLICY ?= passive
ifeq ($(OMP_WAIT_POLICY),passive)
export GOMP_SPINCOUNT ?= 5000
endif

# the driver of experiments; the + has `make -n` call it, too, to show the runs
DRY := $(if $(findstring n,$(firstword -$(MAKEFLAGS))),--dry_run)
RUN = +$(if $(DRY),test ! -x $(BIN)/python ||) $(BIN)/python -m experiments.run

.PHONY: help quickstart shapes shapes-scratch paper demo lint test mutants benchmarks gpu clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z].*:.*## / { split($$1, name, " "); printf "%-16s%s\n", name[1], $$2 }' Makefile

quickstart: .venv/installed  ## pre-train on drawn scenes and retrieve among 500: 6 GB of disk, minutes on two cores
	$(BIN)/python -m dataset.shapes --output data/shapes
	$(BIN)/python Pretrain.py --config configs/shapes/Pretrain.yaml --output_dir output/quickstart --resume
	$(BIN)/python -m tools.visualize --run output/quickstart

shapes: .venv/installed  ## train every task on the drawn scenes: hours on two cores
	$(RUN) experiments/shapes.yaml $(DRY)

shapes-scratch: .venv/installed  ## train every task on the drawn scenes without pre-training: hours
	$(RUN) experiments/shapes.yaml --scratch $(DRY)

paper: .venv/installed  ## test the paper's claims on drawn scenes: hours on two cores
	$(RUN) experiments/paper.yaml $(DRY)

# on the checkpoint of quickstart, which is trained if it is missing, and existing checkpoints of shapes
demo: .venv/installed-demo $(if $(wildcard output/quickstart/checkpoint_last.pth),,quickstart)  ## open a page on the trained models
	$(BIN)/python -m tools.search index data/shapes/images/test --checkpoint output/quickstart --output output/search
	$(BIN)/python -m tools.demo output/quickstart $(sort $(dir $(wildcard output/shapes/*/checkpoint_*.pth))) --index output/search

lint: .venv/installed-dev  ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/ty check

test: .venv/installed-dev  ## run the tests: minutes on two cores
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal tests

mutants: .venv/installed-dev  ## put mistakes into the code and run its tests: two hours on one core
	$(BIN)/python tests/mutants.py

benchmarks: .venv/installed  ## print the tables of time and memory
	$(BIN)/python benchmarks/dataloader.py --workers 0 1 2
	$(BIN)/python benchmarks/pretrain_step.py
	$(BIN)/python benchmarks/retrieval_eval.py
	$(BIN)/python benchmarks/vqa_ranking.py

gpu: .venv/installed  ## check and measure this machine's GPUs
	$(BIN)/python tests/gpu/report.py

.venv/installed: requirements.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@

.venv/installed-demo: .venv/installed requirements-demo.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-demo.txt -c constraints.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt requirements-demo.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@

clean:  ## remove .venv and caches; output and data stay
	rm -rf .venv .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
