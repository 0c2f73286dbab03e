PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# CI replaces these two: it also runs the slow ones and real federations, and asks for coverage.
TEST_MARKS ?= not slow and not deployment and not gpu and not soak
RUN ?= pytest --numprocesses 2 --dist loadfile

.PHONY: simulate test check format bench faults soak fuzz kill docs clean

simulate: $(VENV)/installed
	$(BIN)/feverfew-simulate $(OVERRIDES)

test: $(VENV)/installed-dev
	$(BIN)/$(RUN) -m "$(TEST_MARKS)"

check: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Every figure of benchmarks/RESULTS.md, beside plain PyTorch, Opacus, Flower and NVIDIA FLARE: about an hour, on a machine with nothing else to do.
BENCH ?=
bench: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.page $(BENCH)

# Coverage-guided fuzzing of every parser of outside bytes, ten minutes each; what is found goes to fuzz/.
FUZZ ?= checkpoint dicom messages objects plan site table
fuzz: $(VENV)/installed-dev
	$(BIN)/pip install --quiet --editable '.[fuzz]'
	for parser in $(FUZZ); do $(BIN)/python -W ignore -m tests.fuzz $$parser || exit 1; done

# Every process of a federation killed at every point, disks full, clocks wrong: about fifteen minutes.
faults: $(VENV)/installed-dev
	$(BIN)/pytest -m faults tests/test_faults.py

# Two hundred rounds while processes are killed at random: the same bits, and nothing grows; about twenty minutes.
soak: $(VENV)/installed-dev
	$(BIN)/pytest -s -m soak tests/test_soak.py

# Two hundred runs of a site that is killed and asked again at random.
kill: $(VENV)/installed-dev
	$(BIN)/python -c 'from tests.crash import repeat; print(repeat(200), "misses in 200 runs")'

# The table of docs/compliance.md, from server/compliance.yaml.
docs: $(VENV)/installed-dev
	$(BIN)/python -m server.compliance

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml $(VENV)/installed
	$(BIN)/pip install --quiet --editable '.[ray,dev]'
	touch $@
