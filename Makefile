# Each target is enough by itself in a fresh clone: the environment is made when it is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test differential reference guides fuzz check docs clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --editable '.[clients,dev]' --constraint constraints.txt
	touch $@

# PASSIVE: on a busy machine, threads that wait by spinning take the cores from those that work.
demo: install
	OMP_WAIT_POLICY=PASSIVE $(BIN)/veneer train examples/reminders.yaml --overwrite
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/reminders.py

# One torch thread for each pytest worker.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# The same 500 random sequences of calls on veneer under the name peft and on the real PEFT.
differential: install
	VENEER_DIFFERENTIAL=500 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_differential.py

# PEFT's own tests, on PEFT and on veneer under its name; see tests/reference.
reference: install
	$(BIN)/python -m tests.reference

# The commands of docs/guides on the real model.
guides: install
	VENEER_GUIDES=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_guides_run.py

# Mutants of saved adapters; see docs/guarantees.md.
fuzz: install
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.fuzz --mutants 2500 --seed 0

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The site, in build/site.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv demo-output build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
