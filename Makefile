# Two commands for a stranger, `make demo` and `make test`; both install into .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean install

demo: .venv/.installed
	$(BIN)/meansparse-fx demo --out demo-out

# pytest exits with 5 where it finds no slow test; that is no failure.
test: .venv/.installed
	$(BIN)/python -m pytest -q -m "not slow"
	@$(BIN)/python -m pytest -q -m slow || [ $$? -eq 5 ]

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: .venv/.installed

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -e '.[zoo,dev]'
	touch $@

# What runs left behind; .venv stays.
clean:
	rm -rf build dist demo-out .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find meansparse_fx kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
