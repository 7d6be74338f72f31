# make train   set up .venv, record and encode gameplay, train the demo's first stage
# make demo    the same for all stages of RECIPE=name, on gameplay of its own in data/<name>
# make test    set up what tests need and run them; test-full, drills and test-slurm run the rest
# make kernels compile every kernel for absent GPUs, and show registers, spills and shared memory
# make browser open the page of a run in Chromium, where it is installed
# make device-day pack what a machine with a GPU needs to prove the rest, into DEVICE_DAY=folder
# Variables: PYTHON=python3.12   VENV=folder   TORCH="torch==2.13.0"
#   TORCH_PIP_ARGS="pip options for it"   ARGS="more overrides for train and demo"
#   RECORD="options of data_shards.record"   ENCODE="options of data_shards.encode"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_PIP_ARGS ?=
ARGS ?=
RECIPE ?= demo
DATA ?= data/$(RECIPE)
# What a recipe's demo looks at: RECORD_<recipe> and ENCODE_<recipe>, where it is not this.
RECORD_waypoint ?= scenario=rooms clips=320 clips_per_episode=1 frames=80 fps=16 look_degrees=2 workers=2
ENCODE_waypoint ?= codec=lapped channels=24 temporal_stride=4 layout=grouped resize=128x192 workers=2 shard_mb=7
RECORD_moworld ?= scenario=rooms clips=120 clips_per_episode=1 frames=161 fps=16 workers=2
# of a recipe that learns on small pictures first: the same recording once more, in <DATA>_small
SMALL_waypoint ?= codec=lapped channels=24 temporal_stride=4 layout=grouped resize=64x96 workers=2 shard_mb=2
SMALL ?= $(SMALL_$(RECIPE))
DEMO_sana_wm = $(if $(ONE_DEVICE),,$(MESH))
DEMO_waypoint = $(if $(ONE_DEVICE),,$(MESH)) recipe.stages.pretrain_360p.data.path=$(DATA)_small
RECORD ?= $(or $(RECORD_$(RECIPE)),scenario=rooms clips=240 clips_per_episode=1 frames=81 fps=16 workers=2)
ENCODE ?= $(or $(ENCODE_$(RECIPE)),codec=lapped channels=24 workers=2 shard_mb=7)
DEVICE_DAY ?= build/device_day

PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip install --disable-pip-version-check -qq
ACCELERATOR := $(shell command -v nvidia-smi || command -v npu-smi)
# One device takes one worker; on CPUs, and on more devices, the demo's two workers fit. Each holds
# the whole model: one this small is sooner summed up than gathered.
ONE_DEVICE := $(shell [ "$$( (nvidia-smi -L) 2>/dev/null | wc -l)" = 1 ] && echo launcher.workers=1)
MESH := $(or $(ONE_DEVICE),parallel.dp_replicate=2)
export OMP_NUM_THREADS ?= 1

.PHONY: train demo test test-full drills test-slurm kernels browser device-day lint types clean
.DELETE_ON_ERROR:

train: $(VENV)/.demo $(DATA)/dataset.json
	@$(PY) -m wm_train.launch experiment=demo recipe=demo stage=1 data.path=$(DATA) $(MESH) $(ARGS)

demo: $(VENV)/.demo $(DATA)/dataset.json
	@$(PY) -m wm_train.launch experiment=demo recipe=$(RECIPE) stage=all data.path=$(DATA) \
	  $(DEMO_$(RECIPE)) $(ONE_DEVICE) $(ARGS)

test: $(VENV)/.dev
	@$(PY) tests/run_parts.py -m "not full and not drill and not slurm"

test-full: $(VENV)/.dev
	@$(PY) tests/run_parts.py -m "not drill and not slurm"

drills: $(VENV)/.dev
	@$(PY) -m pytest -m drill

test-slurm: $(VENV)/.dev
	@$(PY) -m pytest -m slurm

kernels: $(VENV)/.dev
	@$(PY) -m pytest -m full tests/kernels/test_ahead.py

browser: $(VENV)/.dev
	@$(PY) -m pytest tests/wm_train/report/test_page_in_browser.py

device-day:
	@$(PYTHON) benchmarks/device_day.py --pack "$(DEVICE_DAY)"

lint: $(VENV)/.dev
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

types: $(VENV)/.dev
	@$(PY) -m mypy

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python: got `$(PYTHON) --version 2>&1`, expected 3.11 or newer." \
	  "Fix: make PYTHON=python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# First and alone, so that no other package decides which build is installed. An installed torch is
# kept. Without an accelerator a CPU build is requested, as the usual one brings gigabytes of device
# libraries; from an index without CPU builds the usual one comes.
$(VENV)/.torch: $(VENV)/.made
	@if $(PY) -c 'import torch' 2>/dev/null; then echo "keeping the torch that is installed"; \
	elif [ -z "$(ACCELERATOR)$(TORCH_PIP_ARGS)" ] && $(INSTALL) "$(TORCH)+cpu" 2>/dev/null; then \
	  echo "installed a CPU build of torch"; \
	else echo "installing $(TORCH)"; $(INSTALL) "$(TORCH)" $(TORCH_PIP_ARGS); fi
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "installing wm_train"
	@$(INSTALL) -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "installing wm_train and what its tests need"
	@$(INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@

# record and encode give a folder its name when it is complete; after an interruption they start
# again or resume. So a folder without dataset.json belongs to the user, and make must not delete
# dataset.json when a command fails after it was written.
.PRECIOUS: $(DATA)/dataset.json
$(DATA)/dataset.json: | $(VENV)/.demo
	@if [ ! -e "configs/recipe/$(RECIPE).yaml" ]; then echo "RECIPE: got $(RECIPE), expected one of" \
	  $(notdir $(basename $(wildcard configs/recipe/*.yaml))). "Fix: make demo RECIPE=sana_wm" >&2; \
	  exit 2; fi
	@if [ -e "$(DATA)" ]; then echo "DATA: got $(DATA), which exists and is no data set," \
	  "expected a data set or a new folder. Fix: make train DATA=<another folder>" >&2; exit 2; fi
	$(PY) -m data_shards.record vizdoom out=$(DATA)_recording $(RECORD)
	$(if $(SMALL),$(PY) -m data_shards.encode source=$(DATA)_recording out=$(DATA)_small $(SMALL))
	$(PY) -m data_shards.encode source=$(DATA)_recording out=$(DATA) $(ENCODE)
