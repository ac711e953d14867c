# make demo: set up, train GLANN on real digits, measure it, all on the CPU. make test: set up and test.
#
# PIP_ARGS is handed to pip: where a CPU build of torch lies at hand, PIP_ARGS="--find-links FOLDER" takes it.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin
OUT ?= runs/demo
# Arguments of the demo's training beyond its defaults; CI trains a tenth as long.
DEMO_ARGS ?=
STAGE ?= test
JOBS ?= 2
RESULTS ?= benchmarks/results

export FASTGEN_REQUIRE_EXT = 1

.PHONY: build demo test check check-kernels bench gpu clean

build: $(VENV)/installed

# Editable: Python changes need no reinstall, the extension's and the pins' do. Of the many modules installed few are
# ever imported: Python compiles those then (26 s less of 160).
$(VENV)/installed: setup.py pyproject.toml constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $@

demo: build
	@if [ -e $(OUT) ]; then kept=$(OUT).$$(date -r $(OUT) +%Y%m%d-%H%M%S); mv $(OUT) $$kept && echo "the earlier run is kept in $$kept"; fi
	$(BIN)/fastgen train glann --data mnist5k --out $(OUT) $(DEMO_ARGS)
	$(BIN)/python -m benchmarks demo --out $(OUT)/benchmark.json
	$(BIN)/fastgen evaluate $(OUT)
	@echo "look at $(OUT)/samples.png and $(OUT)/report.md"

# One thread a worker: two OpenMP pools on the same cores wait for each other. Tests of threads ask for theirs.
test: build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

check: build
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Every configuration of every Triton kernel, compiled for every target; needs no GPU. With TRITON=3.6.0 by that version,
# which comes beside the environment's own; the kernels' tests run with it, too.
TRITON ?=
OTHER := $(if $(TRITON),build/triton-$(TRITON))
WITH := $(if $(TRITON),PYTHONPATH=$(CURDIR)/$(OTHER))
check-kernels: build $(OTHER)
	$(WITH) $(BIN)/python -m fastgen.kernels.aot --all
	$(if $(TRITON),$(WITH) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) tests/kernels)

build/triton-%: | build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(PIP_ARGS) --target $@ triton==$*

# Everything, then report.md with its pictures; the peers come with the extra `bench`.
BENCH ?= runs/bench
bench: build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev,bench]'
	$(BIN)/python -m benchmarks all --out $(BENCH)/cpu.json
	$(BIN)/python -m benchmarks largest --out $(BENCH)/cpu.json
	-$(BIN)/python -m benchmarks report $(BENCH)/cpu.json  # names what became slower since the committed run, if anything

# On a machine with a GPU, in place and without installing: python3 there has torch, triton, numpy and pybind11.
# GPU_ARGS="--seconds 200" ends a stage earlier; where the copy is no git checkout, FASTGEN_COMMIT says what it is of.
GPU_ARGS ?=
gpu: gpu-$(STAGE)

.PHONY: gpu-test gpu-bench gpu-tune gpu-profile
gpu-test gpu-bench gpu-tune gpu-profile: gpu-%:
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m benchmarks gpu $* --results $(RESULTS) $(GPU_ARGS)

clean:
	rm -rf build dist *.egg-info fastgen/_C*.so $(VENV)/installed
