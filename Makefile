# Each target is enough by itself in a fresh clone: the environment is made when it is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test test-oldest test-newest test-gguf differential reference architectures guides fuzz check docs \
	clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --editable '.[clients,dev]' --constraint constraints.txt
	touch $@

# What a user installs, without what tests and checks need.
.venv/usable: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --editable . --constraint constraints.txt
	touch $@

# PASSIVE: on a busy machine, threads that wait by spinning take the cores from those that work.
demo: .venv/usable
	OMP_WAIT_POLICY=PASSIVE $(BIN)/veneer train examples/reminders.yaml --overwrite
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/reminders.py
	@printf '\nTalk to the adapter:\n  . .venv/bin/activate   # puts veneer on the path of this shell\n  veneer chat --adapter demo-output --compare\n'

# One torch thread for each pytest worker.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# What must hold on every version that is allowed: the laws, parity with PEFT, the tutorial, the clients, a training.
ALL_VERSIONS := $(addprefix tests/test_, laws.py parity.py tutorial.py clients.py train_verb.py train_processes.py \
	trainer.py prompts.py upstream.py versions.py)
TESTS ?= $(ALL_VERSIONS)
# The oldest torch is a CUDA build of several GB where the index has no other; another one may be tried in its place.
OLDEST_TORCH ?= $(shell sed -n 's/^torch==//p' constraints-oldest.txt)
NEWEST_TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)

test-oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(TESTS)

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	sed 's/^torch==.*/torch==$(OLDEST_TORCH)/' constraints-oldest.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --editable '.[clients,test]' --constraint .venv-oldest/constraints.txt
	touch $@

# Whatever the index has today; made anew each time.
test-newest:
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --upgrade --upgrade-strategy eager --editable '.[clients,test]' \
		torch==$(NEWEST_TORCH)
	.venv-newest/bin/veneer doctor
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest $(TESTS)

# Exported GGUF files in llama.cpp itself, which is built from source once.
test-gguf: install .venv-gguf/installed
	VENEER_GGUF=$(CURDIR)/.venv-gguf/bin/python $(BIN)/python -m pytest -n 1 tests/test_llama_cpp.py

.venv-gguf/installed: tests/llama-cpp-requirements.txt
	$(PYTHON) -m venv .venv-gguf
	.venv-gguf/bin/python -m pip install --no-binary llama-cpp-python --requirement $<
	touch $@

# The same 500 random sequences of calls on veneer under the name peft and on the real PEFT.
differential: install
	VENEER_DIFFERENTIAL=500 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_differential.py

# PEFT's own tests, on PEFT and on veneer under its name; see tests/reference.
reference: install
	$(BIN)/python -m tests.reference

# Every model class of transformers that generates text, built tiny; writes docs/architectures.json.
architectures: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.architectures

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
	$(BIN)/lint-imports

# The site, in build/site. `python docs/pictures.py` makes its pictures from real runs.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-gguf demo-output build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
