# make train   sets up .venv, then trains the table analyst from nothing and evaluates it
# make test    sets up .venv, then lints, type-checks and tests

PYTHON ?= $(shell for p in python3 python3.11 python3.12; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# One rank for each GPU; two on a machine without.
RANKS ?= $(shell n=$$(nvidia-smi -L 2>/dev/null | grep -c ^GPU); [ $$n -gt 0 ] && echo $$n || echo 2)
TORCHRUN := $(BIN)/torchrun --standalone --nproc-per-node $(RANKS) -m

.PHONY: train test test-slow test-gpu lint types bench clean

train: .venv/.train
	@$(TORCHRUN) groupwise.recipes.train train $(ARGS)

# As many workers as cores: hardly a test uses more than one. The tests of a file stay together, with what they share.
test: .venv/.test lint types
	$(BIN)/pytest -n logical --maxprocesses 16 --dist loadfile

test-slow: .venv/.test
	$(BIN)/pytest -m slow

test-gpu: .venv/.test
	$(BIN)/pytest -m gpu

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The package's name is that of no folder here; mypy sees it through a link.
types: .venv/.test
	@mkdir -p .venv/src && ln -sfn ../.. .venv/src/groupwise
	$(BIN)/mypy .venv/src/groupwise

# OUT=FOLDER keeps the records there, and a picture of them.
BENCHES := compile logprob row_identity clamped_delta small_kernels sampling attention paged_attention sampler \
	sandbox agent concurrency exact train shard step synthesis
bench: .venv/.test
	@for name in $(BENCHES); do echo "== $$name" && \
		$(BIN)/python -m groupwise.bench.$$name $(if $(OUT),--out $(OUT)/$$name.json) || exit 1; done
	$(if $(OUT),$(BIN)/python -m groupwise.bench.roofline $(OUT)/*.json --out $(OUT)/roofline.png)

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed; set PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.train: .venv/bin/python setup.py constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[data]'
	@touch $@

.venv/.test: .venv/.train
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[data,test,dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info
