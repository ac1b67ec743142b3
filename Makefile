# make train     trains, compresses and reports the quickstart, on data that ships with scikit-learn
# make compress  prunes the same model by eight methods, and draws what each costs and keeps
# make test      runs the tests
# make lint      checks style
# make claims    measures the claims of the methods (slow); ROOM=optim for one room
# make bench     prints costs as ratios measured in one run; ROOM=optim for one room
# Everything is installed in .venv; PYTHON names the interpreter that makes it.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
CONFIG ?= configs/quickstart.py
ROOM ?= all
BIN := $(VENV)/bin

.PHONY: train compress test lint claims bench clean
.DEFAULT_GOAL := train

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit(f"steelyard needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras, so that the second command installs only what the first did not.
$(VENV)/installed-%: setup.cfg setup.py pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$*]"
	@touch $@

train: $(VENV)/installed-train
	$(BIN)/python -m experiments.train --config=$(CONFIG) $(ARGS)

compress: $(VENV)/installed-train
	$(BIN)/python -m experiments.compress --config=configs/compress_digits.py $(ARGS)

test: $(VENV)/installed-$(EXTRAS)
	$(BIN)/python -m pytest -n auto $(ARGS)

lint: $(VENV)/installed-$(EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

claims: $(VENV)/installed-train
	$(BIN)/python -m experiments.claims --room=$(ROOM) $(ARGS)

# With the TPU compiler, which needs no TPU: bytes moved are read off its programs.
bench: $(VENV)/installed-dev,tpu
	$(BIN)/python -m experiments.bench --room=$(ROOM) $(ARGS)

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .ruff_cache .hypothesis
