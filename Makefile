# `make test` works in a fresh clone: it makes the environment first (once; later calls cost nothing).
VENV   ?= .venv
EXTRAS ?= train,eval,dev
PYTEST_ARGS ?=
WORKERS ?= 3
SERVE_WORKERS ?= 2
# Python writes bytecode: tests start hundreds of processes, each of which would compile the package again.
export PYTHONDONTWRITEBYTECODE =
# The report of make test-parallel, for the tables of docs/parallelism.md.
REPORT ?= build/parallel.xml

# A full path, because a pyenv or conda shim named `python` could take precedence over the environment. $(abspath) is
# not used, because it splits at spaces.
BIN := $(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))/bin
PY := $(BIN)/python
# Serving has its own environment, because vLLM pins torch.
SERVE_VENV ?= .venv-serve
SERVE_PY := $(if $(filter /%,$(SERVE_VENV)),$(SERVE_VENV),$(CURDIR)/$(SERVE_VENV))/bin/python
MODEL ?= runs/smollm2-6MLA24GDN-window/hf-distill

.PHONY: help env serve-env test test-parallel recipe-test docs-tables test-serve demo serve-demo lint format doctor clean

help:
	@echo "make env                          the Python environment in $(VENV) (HYLO_PYTHON=... picks the interpreter)"
	@echo "make test                         env, then the tests (WORKERS=3 at a time; PYTEST_ARGS=... for more)"
	@echo "make test-parallel                every parallel layout, up to 16 processes, and 40 killed runs"
	@echo "make recipe-test                  toy recipes with every lever of docs/recipe.md, killed and resumed (minutes)"
	@echo "make docs-tables                  writes the tables of docs/parallelism.md"
	@echo "make demo RECIPE= PLAN= TP= PP= OUT=   env, then examples/upcycle_smollm2.sh; each variable is optional"
	@echo "make test-serve                   vLLM's CPU build in $(SERVE_VENV), then the tests of serving (SERVE_WORKERS=2)"
	@echo "make serve-demo MODEL=            serve-env, then one chat with the demo's student"
	@echo "make lint | format                ruff"
	@echo "make doctor                       what this machine has, and what each missing package would add"
	@echo "make clean                        removes $(VENV) and the caches, but no run"

env:
	@tools/make_env.sh "$(VENV)" "$(EXTRAS)"

# Test files are distributed over WORKERS processes in the order of tests/conftest.py; most tests keep one core busy.
test: env
	"$(PY)" -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Needs an idle machine: up to sixteen processes, forty killed runs, and full disks. Then writes the tables of
# docs/parallelism.md.
test-parallel: env
	"$(PY)" -m pytest -q -m "parallel or not parallel" --junitxml=$(REPORT) $(PYTEST_ARGS) \
	  tests/parallel/test_parallel_parity.py tests/parallel/test_teacher_fed.py tests/parallel/test_window_halo.py \
	  tests/e2e/test_faults.py tests/checkpoint/test_checkpoints.py tests/distill/test_spike_trainings.py \
	  tests/distill/test_initial_states_resume.py tests/e2e/test_full_disks.py tests/e2e/test_process_death.py \
	  tests/tools/test_benchmarks.py tests/tools/test_scaling.py tests/planner/test_sent.py
	PYTHONPATH=.:tests "$(PY)" tools/docs/parallelism.py --parity $(REPORT)

# Every lever of docs/recipe.md in toy recipes, from conversion to model card: guards that fire, kills, a control.
recipe-test: env
	"$(PY)" -m pytest -q -m "parallel or not parallel" -n $(WORKERS) --dist load $(PYTEST_ARGS) \
	  tests/e2e/test_recipe_levers.py

# Writes the tables of docs/parallelism.md. The parity table is written only if make test-parallel has left its report.
docs-tables: env
	PYTHONPATH=.:tests "$(PY)" tools/docs/parallelism.py $(if $(wildcard $(REPORT)),--parity $(REPORT))

serve-env:
	@tools/make_env.sh "$(SERVE_VENV)" "serve-cpu,test"

# Tests that share a server are a group, which one process runs.
test-serve: serve-env
	"$(SERVE_PY)" -m pytest -q -n $(SERVE_WORKERS) --dist loadgroup $(PYTEST_ARGS) tests/serve

serve-demo: serve-env
	"$(SERVE_PY)" -m hylo_megatron serve-demo "$(MODEL)"

# make passes RECIPE, PLAN, TP, PP and OUT from its command line to the script as environment variables. Without them the
# script uses its defaults.
demo: env
	PATH="$(BIN):$$PATH" PYTHON="$(PY)" bash examples/upcycle_smollm2.sh

lint: env
	"$(PY)" -m ruff check .
	"$(PY)" -m ruff format --check .

format: env
	"$(PY)" -m ruff check --fix .
	"$(PY)" -m ruff format .

doctor: env
	@"$(PY)" tools/doctor.py

# Removes an environment only if it has one of the two files that make_env.sh leaves.
clean:
	@if [ -e "$(VENV)/.hylo-stamp" ] || [ -e "$(VENV)/pip.log" ]; then rm -rf "$(VENV)"; fi
	rm -rf .pytest_cache .ruff_cache build dist *.egg-info
	find $(wildcard hylo_megatron tests tools examples) -name __pycache__ -type d -prune -exec rm -rf {} +
