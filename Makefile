# `make` alone lists the targets. Needs CPython >= 3.11 with pip, make and git; the first target
# that wants more sets up .venv from requirements.lock (hashed; no package index is named).

# Not "/bin/sh": make would then run simple recipes itself, with the PATH that it was started with.
SHELL := sh

# The first of these that is new enough.
PYTHON ?= python3 python3.14 python3.13 python3.12 python3.11
UV := uv==0.13.9
STAMP := .venv/.installed

# DVC looks `python` up here, and so do stages' subprocesses.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Bytecode makes the heavy libraries load two to three times as fast.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install repro test test-slow check smoke same format preset base ui lock clean

help:  ## list the targets (default)
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/\1	\2/p' $(MAKEFILE_LIST) | \
	    while IFS='	' read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done

install: $(STAMP)  ## set up .venv only; PYTHON=/path/to/python chooses the interpreter

# An environment whose interpreter is gone or too old is made anew. Without uv, pip does the same
# in minutes rather than seconds. A zip download has no .git: DVC must be told, or it does nothing.
$(STAMP): requirements.lock pyproject.toml
	@set -eu; \
	fit='import sys; sys.exit(sys.version_info < (3, 11))'; \
	if ! .venv/bin/python -c "$$fit" 2>/dev/null; then \
	    found=; \
	    for python in $(PYTHON); do \
	        if "$$python" -c "$$fit" 2>/dev/null; then found=$$python; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "No CPython >= 3.11 among: $(PYTHON). Install one, or name it:" >&2; \
	        echo "  make install PYTHON=/path/to/python3.11" >&2; \
	        exit 1; \
	    fi; \
	    "$$found" -m venv --clear .venv; \
	fi; \
	if .venv/bin/python -m pip install --quiet --disable-pip-version-check '$(UV)' \
	    && VIRTUAL_ENV="$(CURDIR)/.venv" uv pip sync --require-hashes --compile-bytecode \
	        requirements.lock; then :; \
	else \
	    echo "uv failed; going on with pip"; \
	    .venv/bin/python -m pip install --disable-pip-version-check --no-deps --require-hashes \
	        -r requirements.lock; \
	fi; \
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    --no-build-isolation -e .; \
	if [ ! -e .git ]; then .venv/bin/dvc config --local core.no_scm true; fi; \
	touch $@

repro: $(STAMP)  ## reproduce everything that params.yaml asks for, from data to report
	@python -m compileall -q contradiff stages
	@dvc pull models/tiny || { \
	    echo "The base model could not be fetched from the store that .dvc/config names (artifacts/" >&2; \
	    echo "in a whole checkout). Restore it, or retrain the base: make base (about 80 minutes)." >&2; \
	    exit 1; }
	dvc repro

# Two workers of one thread each: the tests fit two cores in time and 24 GB in memory.
test: $(STAMP)  ## the tests, less the slow ones, in two processes
	python -m pytest -n 2 --dist loadfile

test-slow: $(STAMP)  ## the slow tests alone
	python -m pytest -m slow

check: $(STAMP)  ## lint, formatting, types, import order, and that dvc.yaml agrees with the code
	ruff check .
	ruff format --check .
	basedpyright
	lint-imports
	python -m pytest -q tests/test_pipeline.py

smoke: $(STAMP)  ## the whole pipeline with presets/smoke.yaml, in a temporary copy
	python -m bench smoke

same: $(STAMP)  ## REV=<commit>: does the working tree give that commit's losses and metrics?
	python -m bench same $(REV)

format: $(STAMP)  ## sort imports, fix what can be fixed, format
	ruff check --fix-only .
	ruff format .

preset:  ## NAME=paper: make presets/paper.yaml the current params.yaml
	@set -eu; \
	names=$$(cd presets && echo *.yaml | sed 's/\.yaml//g'); \
	case " $$names " in \
	    *" $(NAME) "*) ;; \
	    *) echo "make preset NAME=...: '$(NAME)' is not one of: $$names" >&2; exit 1 ;; \
	esac; \
	kept=; \
	for preset in presets/*.yaml; do \
	    if cmp -s "$$preset" params.yaml; then kept=$$preset; fi; \
	done; \
	if [ -z "$$kept" ] && [ -e params.yaml ]; then \
	    cp params.yaml params.yaml.bak; \
	    echo "params.yaml equals no preset: kept as params.yaml.bak"; \
	fi; \
	cp "presets/$(NAME).yaml" params.yaml; \
	echo "params.yaml is now presets/$(NAME).yaml"

# The stage is frozen, so that nobody retrains the base by accident, not even by `dvc repro -f`.
base: $(STAMP)  ## retrain the tiny base model (about 80 minutes); then `dvc push pretrain_base`
	python -m stages.pretrain_base
	dvc commit -f pretrain_base

ui: $(STAMP)  ## MLflow's pages on this machine; they take up to a minute to start
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --host 127.0.0.1 --workers 1

lock: $(STAMP)  ## pin pyproject.toml's dependencies; ARGS=--upgrade takes the newest
	uv pip compile pyproject.toml --group dev --universal --python-version 3.11 \
	    --generate-hashes --no-annotate --no-header \
	    -o requirements.lock -q $(ARGS)

clean:  ## remove build/, checkpoints and tools' caches (`dvc checkout` brings build/ back)
	rm -rf build .work .pytest_cache .ruff_cache .hypothesis .import_linter_cache .grimp_cache *.egg-info
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
