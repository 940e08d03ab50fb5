# One command per task. `make demo` and `make test` need only Python 3.11 or later.

PYTHON ?= python3
BIN := .venv/bin
PYTEST := -m pytest -n auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder

# Bytecode is kept: it takes each of many processes seconds to compile what it imports. pip would compile everything on one
# core. The packages of which much is imported are compiled on all cores, the others when they are imported.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable
HEAVY := torch sympy scipy pandas timm matplotlib numpy torchvision
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(HEAVY:%=.venv/lib/python3*/site-packages/%) src || true

# Labeled synthetic images for the evaluation of the demo.
LABELLED := --train shapes:count=4000,seed=101,size=48 --test shapes:count=2000,seed=102,size=48

# Labeled shards of Caltech-101 and Imagewoof, see benchmarks/claims.py, and folders of results. To measure all anew,
# choose other folders: make claims CLAIMS=runs/claims.
OBJECTS ?= objects128
CLAIMS ?= benchmarks/results/claims
METHODS ?= benchmarks/results/methods

.PHONY: demo test test-long test-lowest check format docs bench gpu claims claims-page methods methods-page clean

demo: .venv/installed  ## pre-train on synthetic shapes, evaluate, write runs/demo/report.html
	rm -rf runs/demo
	$(BIN)/pixmim pretrain demo --out runs/demo $(DEMO)
	$(BIN)/pixmim evaluate knn runs/demo $(LABELLED) --untrained
	$(BIN)/pixmim evaluate linear runs/demo $(LABELLED) --untrained
	$(BIN)/pixmim evaluate attentive runs/demo $(LABELLED) --untrained
	@echo "look at what it learned: $(BIN)/pixmim view runs/demo"

test: .venv/developing  ## the test suite
	$(BIN)/python $(PYTEST)

test-long: .venv/developing  ## the tests that take minutes: kills of up to 8 processes, and the demo on two seeds
	PIXMIM_LONG=1 $(BIN)/python $(PYTEST) tests/training/test_fault_tolerance.py tests/test_pretrain.py

# With the oldest versions that pyproject.toml promises, and the Python of most rented GPU machines.
test-lowest: LOWEST := .venv-lowest/bin/python
test-lowest: PYTHON := python3.12
test-lowest:  ## the test suite with the lowest versions that pyproject.toml allows, in an environment of its own
	test -d .venv-lowest || $(PYTHON) -m venv .venv-lowest
	grep -o '"[A-Za-z_-]\+\(\[[^]]*\]\)\?>=[0-9.]*"' pyproject.toml | sed 's/"//g; s/\[[^]]*\]//; s/>=/==/' > .venv-lowest/constraints.txt
	$(LOWEST) -m pip install --quiet --constraint .venv-lowest/constraints.txt --editable '.[dev]'
	$(LOWEST) $(PYTEST)

check: .venv/developing  ## format, lint, types, import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini
	$(BIN)/lint-imports

format: .venv/developing  ## format, and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/documenting  ## build the documentation site into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: .venv/developing  ## throughput against other implementations, interleaved in one process
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/step.py --backbone vit_base_patch16_224 --size 224 --patch 16 --batch 16 --rounds 3
	$(BIN)/python benchmarks/family.py
	$(BIN)/python benchmarks/cost.py
	$(BIN)/python benchmarks/lowpass.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/knn.py
	$(BIN)/python benchmarks/host.py
	@echo "and, with a folder of photographs: $(BIN)/python benchmarks/data.py (loaders.py, features.py) --data FOLDER"

# With the machine's own Python, which needs torch and no network: make gpu GPU="--packages packages --data photos"
gpu:  ## everything that needs a GPU, in nine minutes; make gpu GPU=--dry: at tiny size on the CPU
	$(PYTHON) benchmarks/gpu.py $(GPU)

claims: .venv/developing  ## the paper's claims, small: train and measure what is missing, in hours; resumes
	$(BIN)/python benchmarks/claims.py --objects $(OBJECTS) --out $(CLAIMS)
	$(MAKE) claims-page

claims-page: .venv/developing  ## docs/claims.md and its figure, from the results that are there
	$(BIN)/python benchmarks/claims.py --out $(CLAIMS) --table

methods: .venv/developing  ## every method, small, plain and with PixMIM: train and measure what is missing, in hours; resumes
	$(BIN)/python benchmarks/methods.py --objects $(OBJECTS) --out $(METHODS)
	$(MAKE) methods-page

methods-page: .venv/developing  ## the table of docs/methods.md, from the results that are there
	$(BIN)/python benchmarks/methods.py --out $(METHODS) --table

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pixmim needs Python 3.11 or later: make PYTHON=...")'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) '.[view]'
	$(COMPILE)
	touch $@

.venv/developing: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) '.[dev]'
	$(COMPILE)
	touch .venv/installed $@

.venv/documenting: .venv/installed
	$(INSTALL) '.[docs]'
	touch $@

clean:
	rm -rf site .venv .venv-lowest .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
