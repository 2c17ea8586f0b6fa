# Every target installs what it needs into .venv first: a fresh clone needs Python and make only.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
# The newest Python of this machine on which the newest JAX runs.
NEWEST := $(shell for v in 15 14 13 12; do \
	for p in python3.$$v $$HOME/.pyenv/versions/3.$$v.*/bin/python; do \
	$$p -c '' 2>/dev/null && command -v $$p && exit; done; done)
NEWEST_VENV := .venv-newest
NEWEST_READY := $(NEWEST_VENV)/.installed
AOT_VENV := .venv-gpu-aot
AOT_READY := $(AOT_VENV)/.installed
AOT12_VENV := .venv-gpu-aot-cuda12
AOT12_READY := $(AOT12_VENV)/.installed
DOCS_VENV := .venv-docs
DOCS_READY := $(DOCS_VENV)/.installed
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv test test-all test-newest test-gpu-aot lint graph format demo notebook docs picture \
	bench-search bench-space bench-compile bench-compare bench-memory bench-costs bench-gpu bench-forward \
	bench-truth bench-cluster cluster-test gpu-check paper fuzz clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(READY)  ## Create .venv and install the package with its development tools

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "jaxlwp needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Installing into $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

test: $(READY)  ## Run the fast tests
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

test-all: $(READY)  ## Run every test, the slow sweeps too
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m ""

# An environment of its own: beside the plugin, JAX would look for a GPU whenever it starts.
$(AOT_READY): pyproject.toml
	@echo "Installing into $(AOT_VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(AOT_VENV)
	@$(AOT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev,gpu-aot]'
	@touch $@

# The plugin for CUDA 12 knows P100 and V100, and does not go beside the one for CUDA 13.
$(AOT12_READY): pyproject.toml
	@echo "Installing into $(AOT12_VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(AOT12_VENV)
	@$(AOT12_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		-e '.[dev,gpu-aot-cuda12]'
	@touch $@

test-gpu-aot: $(AOT_READY)  ## Compile plans for 16 H200s that are not there (downloads 250 MB)
	JAX_PLATFORMS=cpu $(AOT_VENV)/bin/python -m pytest -q -m gpu_aot tests/test_compiled.py \
		tests/test_forecast.py tests/test_target.py

$(NEWEST_READY): pyproject.toml
	@echo "Installing into $(NEWEST_VENV) with $(NEWEST) (a few minutes the first time)"
	@$(NEWEST) -m venv $(NEWEST_VENV)
	@$(NEWEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

NEWEST_TESTS := $(addprefix tests/, test_architecture.py test_borders.py test_config.py \
	test_constants.py test_forecast.py test_forward.py test_habits.py test_kernels.py test_measure.py \
	test_memory.py test_pages.py test_plan.py test_resize.py test_sums.py test_verify.py test_vmap.py \
	contracts/test_halos.py contracts/test_meshes.py contracts/test_pointwise.py \
	contracts/test_priced.py contracts/test_programs.py)
COMING_TESTS := $(addprefix tests/, test_habits.py test_memory.py contracts/test_priced.py \
	contracts/test_scans.py)

ifeq ($(NEWEST),)
test-newest:  ## Run what depends on JAX with the newest one and its coming flags, on the newest Python here
	@echo "test-newest: ran nothing, this machine has no Python 3.12 or newer; the newest JAX needs one"
else
test-newest: $(NEWEST_READY)
	$(NEWEST_VENV)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal $(NEWEST_TESTS)
	JAX_CUSTOM_VJP3=1 JAX_REMAT3=1 $(NEWEST_VENV)/bin/python -m pytest -q -n $(WORKERS) \
		--dist worksteal $(COMING_TESTS)
	$(foreach nb,$(NOTEBOOKS),PYTHONPATH="$(CURDIR)" $(NEWEST_VENV)/bin/jupyter execute \
		--timeout=600 "$(nb)" &&) true
endif

lint: $(READY)  ## Check style, formatting, types, and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy jaxlwp models
	$(BIN)/lint-imports

graph: $(READY)  ## Print which folder of the package imports which
	$(BIN)/python -m tests.import_graph

format: $(READY)  ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(READY)  ## Search and run a strategy on simulated devices
	$(BIN)/python -m demo

notebook: $(READY)  ## Execute the notebooks; an error in a cell fails
	@$(if $(NOTEBOOKS),,echo "no notebooks")
	$(foreach nb,$(NOTEBOOKS),PYTHONPATH="$(CURDIR)" $(BIN)/jupyter execute --timeout=600 "$(nb)" &&) true

# Without jaxlwp: the pages are made from its sources.
$(DOCS_READY): pyproject.toml
	@echo "Installing into $(DOCS_VENV) (a minute the first time)"
	@$(PYTHON) -m venv $(DOCS_VENV)
	@$(PYTHON) -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*project["optional-dependencies"]["docs"], sep="\n")' > $(DOCS_VENV)/requirements.txt
	@$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		-r $(DOCS_VENV)/requirements.txt
	@touch $@

docs: $(DOCS_READY)  ## Build the documentation into site/, warnings as errors, and look at it in Chromium
	NO_MKDOCS_2_WARNING=1 PATH="$(CURDIR)/$(DOCS_VENV)/bin:$$PATH" \
		$(DOCS_VENV)/bin/mkdocs build --strict
	$(DOCS_VENV)/bin/python -m tests.site

picture: $(READY)  ## Draw the plan in the README again (Chromium)
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.picture

SEEDS ?= 0:100
fuzz: $(READY)  ## Check random programs under random strategies; SEEDS=first:stop
	$(BIN)/python -m tests.fuzz --seeds $(SEEDS) --workers $(WORKERS) \
		--json tests/benchmarks/results/fuzz.json

SIMULATED := XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu

bench-search: $(READY)  ## Time the search on the paper's networks, and against other solvers
	$(SIMULATED) $(BIN)/python -m tests.benchmarks.search
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.solvers

bench-costs: $(READY)  ## Predicted against measured steps, lazy against full tables (hours)
	$(BIN)/python -m tests.benchmarks.costs

paper: $(READY)  ## The paper's tables and figures beside ours, by given rates (minutes, no devices)
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.benchmarks.paper

gpu-check: $(READY)  ## Correctness, ceilings, steps beside plain JAX's, layer times on one GPU (under 8 minutes)
	$(BIN)/python -m tests.benchmarks.gpu_check

bench-compile: $(READY)  ## Time tracing and compiling beside plain JAX
	$(SIMULATED) $(BIN)/python -m tests.benchmarks.compile

bench-space: $(READY)  ## Measure what one fixed order of mesh axes costs
	$(SIMULATED) $(BIN)/python -m tests.benchmarks.space

bench-compare: $(READY)  ## Run AlexNet under every strategy on 8 simulated devices
	$(BIN)/jaxlwp compare models.alexnet:AlexNet --devices 8 --batch 32 \
		--json tests/benchmarks/results/compare-alexnet.json

bench-gpu: $(AOT_READY)  ## Plans beside plain JAX, compiled for GPUs that are not there (hours; resumes)
	JAX_PLATFORMS=cpu $(AOT_VENV)/bin/python -m tests.benchmarks.gpu
	JAX_PLATFORMS=cpu $(AOT_VENV)/bin/python -m tests.benchmarks.gpu --small --only plain one found data spatial
	JAX_PLATFORMS=cpu $(AOT_VENV)/bin/python -m tests.benchmarks.gpu --slow --targets h200:2x8 --only plain found data owt

bench-forward: $(AOT_READY)  ## Decoders and volumes that are only evaluated, one example on 4 and 8 GPUs (an hour; resumes)
	JAX_PLATFORMS=cpu $(AOT_VENV)/bin/python -m tests.benchmarks.forward

bench-truth: $(AOT_READY) $(AOT12_READY)  ## Forecasts beside published GPU measurements (an hour; resumes)
	JAX_PLATFORMS=cpu $(AOT12_VENV)/bin/python -m tests.benchmarks.truth
	JAX_PLATFORMS=cpu $(AOT_VENV)/bin/python -m tests.benchmarks.truth

cluster-test: $(READY)  ## Test on hosts made of network namespaces (root; elsewhere it says why not)
	$(BIN)/python -m tests.cluster

bench-cluster: $(READY)  ## Measure AlexNet and VGG-16 on 4 such hosts, on three link rates (hours; resumes)
	$(BIN)/python -m tests.cluster.measure

bench-memory: $(AOT_READY)  ## Compare predicted memory with what is compiled for 16 H200s
	JAX_PLATFORMS=cpu $(AOT_VENV)/bin/python -m tests.benchmarks.memory
	JAX_PLATFORMS=cpu $(AOT_VENV)/bin/python -m tests.benchmarks.memory --limits

clean:  ## Remove the environment and all caches
	rm -rf $(VENV) $(AOT_VENV) $(AOT12_VENV) $(NEWEST_VENV) $(DOCS_VENV) site build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
