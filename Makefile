# Every target makes its own virtual environment in .venv and installs what it needs; a second call reuses it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart openclipart test benchmarks clean

quickstart: .venv/installed
	$(BIN)/python -m dataset.shapes --output data/shapes
	$(BIN)/python Pretrain.py --config configs/shapes/Pretrain.yaml --output_dir output/quickstart --resume
	$(BIN)/python Visualize.py --output_dir output/quickstart

openclipart: .venv/installed
	$(BIN)/python -m dataset.openclipart --output data/openclipart
	$(BIN)/python -m models.tokenizer data/openclipart/train.json --size 6000 --output data/openclipart/vocab.txt
	$(BIN)/python Pretrain.py --config configs/openclipart/Pretrain.yaml --output_dir output/openclipart --resume
	$(BIN)/python Visualize.py --output_dir output/openclipart

test: .venv/installed-dev
	$(BIN)/python -m pytest -q tests

benchmarks: .venv/installed
	$(BIN)/python benchmarks/dataloader.py
	$(BIN)/python benchmarks/annotations.py
	$(BIN)/python benchmarks/pretrain_step.py
	$(BIN)/python benchmarks/retrieval_eval.py

.venv/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv output data
