# Needs python >= 3.10 and make; everything else is installed into .venv.
# Another Python: make PYTHON=python3.12 ...   Another place for packages: pip's own settings (PIP_INDEX_URL and so on).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

BENCHMARKS := first_step throughput checkpoint_stall report_cost memory allreduce train_step overhead network local_steps recovery_time resize_pause

.DEFAULT_GOAL := help
.NOTPARALLEL: # all targets share .venv, and tests measure time
.PHONY: help demo test check faults sim soak lint format bench conformance conformance-ray clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.demo ## train a small network on handwritten digits with 2 workers
	$(BIN)/python jobs/train_digits.py --workers 2

test: $(VENV)/.dev ## run all tests
	$(BIN)/python -m pytest

check: lint ## lint and run the fast tests
	$(BIN)/python -m pytest -m "not slow and not tensorflow"

faults: $(VENV)/.dev ## run the tests of faults that `make test` leaves out (a quarter of an hour)
	$(BIN)/python -m pytest -m long

sim: $(VENV)/.dev ## drive the planner through 10,000 made-up lives with faults
	$(BIN)/python -m lepton_ray.sim.drive --seeds 10000

soak: $(VENV)/.dev ## disturb a run for five minutes, and 200 small ones at random (a quarter of an hour)
	$(BIN)/python -m tests.faults.soak

lint: $(VENV)/.dev ## check style, types and import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev ## format the code and repair what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev ## run all benchmarks, one JSON line each
	@for name in $(BENCHMARKS); do echo "$$name"; $(BIN)/python "benchmarks/$$name.py" || exit 1; done

conformance: $(VENV)/.dev ## run torch's own tests of process groups on our backend and on Gloo (some minutes)
	$(INSTALL) expecttest # of torch's tests
	$(BIN)/python tests/conformance/torch_distributed.py lepton
	-$(BIN)/python tests/conformance/torch_distributed.py gloo # for comparison: it fails some

conformance-ray: $(VENV)/.dev ## run Ray's tests of its collective API on Gloo and ours (some minutes)
	@test -d "$(RAY_TESTS)" || { echo "Use: make $@ RAY_TESTS=<checkout of Ray>/python/ray/util/collective/tests"; exit 2; }
	-$(BIN)/python tests/conformance/ray_collective.py gloo "$(RAY_TESTS)"
	$(BIN)/python tests/conformance/ray_collective.py lepton "$(RAY_TESTS)"

clean: ## remove .venv and everything that tools left behind
	rm -rf $(VENV) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache ./*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit( \
		"lepton_ray needs Python 3.10 or newer; $(PYTHON) is %d.%d. Use: make PYTHON=python3.11 $(MAKECMDGOALS)" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.made pyproject.toml constraints.txt
	@echo "Installing what the demo needs into $(VENV) (torch and ray: a minute or two) ..."
	$(INSTALL) -e '.[examples]'
	@touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml constraints.txt
	@echo "Installing what the tests need into $(VENV) (torch and ray: a minute or two) ..."
	$(INSTALL) -e '.[dev]'
	@touch $@
