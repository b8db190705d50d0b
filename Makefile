# Every target makes its own virtual environment in .venv and installs what it needs; a second call reuses it.
PYTHON ?= python3
BIN := .venv/bin

# of the runs on shapes that `shapes` and `shapes-scratch` make: the weights to start from, the folder to write to
FROM := output/shapes/Pretrain/checkpoint_last.pth
TO := output/shapes
TASKS := NLVR VQA Retrieval VE Grounding

.PHONY: quickstart openclipart shapes shapes-scratch tasks $(TASKS) test mutants benchmarks clean

quickstart: .venv/installed
	$(BIN)/python -m dataset.shapes --output data/shapes
	$(BIN)/python Pretrain.py --config configs/shapes/Pretrain.yaml --output_dir output/quickstart --resume
	$(BIN)/python Visualize.py --output_dir output/quickstart

openclipart: .venv/installed
	$(BIN)/python -m dataset.openclipart --output data/openclipart
	$(BIN)/python -m models.tokenizer data/openclipart/train.json --size 6000 --output data/openclipart/vocab.txt
	$(BIN)/python Pretrain.py --config configs/openclipart/Pretrain.yaml --output_dir output/openclipart --resume
	$(BIN)/python Visualize.py --output_dir output/openclipart

shapes: .venv/installed
	$(BIN)/python -m dataset.shapes --output data/shapes
	$(BIN)/python Pretrain.py --config configs/shapes/Pretrain.yaml --set scheduler.epochs=10 --output_dir output/shapes/Pretrain --resume
	OMP_NUM_THREADS=1 $(MAKE) -j2 tasks
	$(BIN)/python benchmarks/shapes_table.py

shapes-scratch: .venv/installed
	$(BIN)/python -m dataset.shapes --output data/shapes
	OMP_NUM_THREADS=1 $(MAKE) -j2 tasks FROM=random TO=output/shapes-scratch
	$(BIN)/python benchmarks/shapes_table.py

tasks: $(TASKS)

# two runs side by side, each on one core, make more of two cores than one run after the other on both
define RUN
	@mkdir -p $(TO) && echo "$(1): running, see $(TO)/$(1).log"
	@$(BIN)/python $(2).py --config configs/shapes/$(1).yaml --output_dir $(TO)/$(1) --resume --checkpoint $(3) \
		>> $(TO)/$(1).log 2>&1; status=$$?; tr '\r' '\n' < $(TO)/$(1).log | tail -n 6; exit $$status
endef

VQA Retrieval VE Grounding:
	$(call RUN,$@,$@,$(FROM))

NLVR:
	$(call RUN,NLVR_pretrain,Pretrain_nlvr,$(FROM))
	$(call RUN,NLVR,NLVR,$(TO)/NLVR_pretrain/checkpoint_last.pth)

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal tests

mutants: .venv/installed-dev
	$(BIN)/python tests/mutants.py

benchmarks: .venv/installed
	$(BIN)/python benchmarks/dataloader.py --workers 0 1 2
	$(BIN)/python benchmarks/annotations.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/pretrain_step.py
	$(BIN)/python benchmarks/retrieval_eval.py
	$(BIN)/python benchmarks/vqa_ranking.py

.venv/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .hypothesis output data
