# Each target sets up what it needs, in .venv, from pinned constraints. Needs Python 3.11 to 3.13, git and make; nothing else.
PYTHON ?= $(firstword $(foreach v,python3.11 python3.12 python3.13 python3,$(if $(shell $(v) -c 'import sys; print(*(["ok"] if (3, 11) <= sys.version_info[:2] <= (3, 13) else []))' 2>/dev/null),$(v))))
BIN := .venv/bin
TEST_WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest tests -n $(TEST_WORKERS)
STAMP := .venv/.installed

.PHONY: demo test lint format coverage contracts bench clean

demo: $(STAMP)
	$(BIN)/tensorlink demo $(DEMO_FLAGS)

test: $(STAMP)
	$(PYTEST) $(TEST_FLAGS)

coverage: $(STAMP)
	rm -f .coverage .coverage.*
	$(PYTEST) --cov --cov-report=term $(TEST_FLAGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Rebuilds smartnodes_core/chain/artifacts from contracts/ (needs node and npm; users do not).
contracts:
	cd contracts && npm ci --ignore-scripts && npm run build

bench: $(STAMP)
	$(BIN)/python benchmarks/benchmark_step.py
	$(BIN)/python benchmarks/benchmark_pipeline.py
	$(BIN)/python benchmarks/benchmark_small_model.py
	$(BIN)/python benchmarks/benchmark_tensor_parallel.py
	$(BIN)/python benchmarks/benchmark_memory.py
	$(BIN)/python benchmarks/benchmark_growth.py
	$(BIN)/python benchmarks/benchmark_overhead.py
	$(BIN)/python benchmarks/benchmark_recovery.py
	$(BIN)/python benchmarks/benchmark_audit.py attacks
	$(BIN)/python benchmarks/benchmark_audit.py honest
	$(BIN)/python benchmarks/benchmark_audit.py roc
	$(BIN)/python benchmarks/benchmark_audit.py time
	$(BIN)/python benchmarks/benchmark_audit.py drift
	$(BIN)/python benchmarks/benchmark_audit.py cost
	$(BIN)/python benchmarks/benchmark_transport.py
	$(BIN)/python benchmarks/benchmark_dht.py
	$(BIN)/python benchmarks/benchmark_relay.py
	$(BIN)/python benchmarks/benchmark_interpreter.py

$(STAMP): setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed and none was found: install one, or run make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage .coverage.*
