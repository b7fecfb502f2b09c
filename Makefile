# Everything goes through these targets; `make book` and `make test` set up what they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One worker a core; the cells of one notebook stay on one worker.
PYTEST := --numprocesses auto --dist loadscope --nbval-lax --nbval-current-env \
	--nbval-cell-timeout 300 --nbval-kernel-startup-timeout 180

.PHONY: book test bench setup update format clean

book: $(READY)
	$(BIN)/wellposed build --quiet

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST) notebooks tests lib

# CPU time, because other programs on the machine disturb it less than the clock on the wall.
bench: $(READY)
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable '.[bench]'
	mkdir -p _build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -o addopts= -o python_files='*.py' \
		--benchmark-timer=time.process_time --benchmark-json=_build/benchmark.json \
		--benchmark-columns=median,iqr,rounds --benchmark-sort=name -q benchmarks

setup: $(READY)

$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 book"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable '.[dev]'
	touch $(READY)

update: $(READY)
	$(BIN)/uv pip compile --quiet --universal --upgrade --extra dev --extra bench --no-header --no-annotate \
		--output-file requirements.lock pyproject.toml
	touch requirements.lock

format: $(READY)
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .

clean:
	rm -rf _build runs
