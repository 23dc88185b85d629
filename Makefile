# Two commands for a stranger, `make demo` and `make test`; both install into .venv first.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin

# OpenMP threads sleep while they wait. Where other programs share the cores, spinning makes the demo's forward and
# backward passes 4 times slower (250 images a second against 1000; two cores of an AMD EPYC, load 4).
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test coverage test-lowest mutants lint docs clean install

demo: .venv/.installed
	$(BIN)/meansparse-fx demo --out demo-out

# Two processes of one thread each: much of the time goes into compilers and into processes that tests start.
test: export OMP_NUM_THREADS ?= 1
test: .venv/.installed
	$(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow"
	$(BIN)/python -m pytest -q -n $(WORKERS) -m slow

# Which branches the fast tests leave out, by line.
coverage: export OMP_NUM_THREADS ?= 1
coverage: .venv/.installed
	$(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow" --cov --cov-report=term-missing

# The oldest torch that is kept working, and the torchvision that belongs to it; pyproject.toml names the same torch.
LOWEST := torch==2.11.0 torchvision==0.26.0

# The fast tests on the oldest torch, in a venv of its own.
test-lowest: export OMP_NUM_THREADS ?= 1
test-lowest: .venv-lowest/.installed
	.venv-lowest/bin/python -m pytest -q -n $(WORKERS) -m "not slow"

# Faults planted one at a time in a module, and those that no test noticed; SAMPLE=40 plants some (SEED=1: others), AGAIN=log
# what an earlier run's print says survived.
mutants: .venv/.installed
	$(BIN)/python tests/mutants.py $(MODULE) $(if $(SAMPLE),--sample $(SAMPLE) --seed $(or $(SEED),0)) $(if $(AGAIN),--again $(AGAIN)) --workers $(WORKERS)

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The API reference, from the docstrings, in build/docs.
docs: .venv/.installed
	$(BIN)/pdoc -d google -o build/docs meansparse_fx

install: .venv/.installed

.venv/.installed: pyproject.toml
.venv-lowest/.installed: pyproject.toml Makefile
.venv-lowest/.installed: PINS := $(LOWEST)
%/.installed:
	$(PYTHON) -m venv $*
	$*/bin/pip install --disable-pip-version-check -e '.[zoo,dev]' $(PINS)
	# Without its dependencies, which the extra dev lists: robustbench pins a timm of 2024, and the tests want today's.
	$*/bin/pip install --disable-pip-version-check --no-deps 'robustbench>=1.1.1'
	touch $@

# What runs left behind; .venv and .venv-lowest stay.
clean:
	rm -rf build dist demo-out .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find meansparse_fx kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
