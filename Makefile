# `make` without a target lists the targets. You need CPython >= 3.11 with pip, make and git. Most
# targets first set up .venv from requirements.lock.

# With "/bin/sh", make would run simple recipes without a shell, and ignore the PATH set below.
SHELL := sh

# `make install` uses the first of these interpreters that is new enough.
PYTHON ?= python3 python3.14 python3.13 python3.12 python3.11
UV := uv==0.13.9
STAMP := .venv/.installed

# DVC and the subprocesses of stages find `python` in this PATH.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Let Python write bytecode files, because large libraries then load faster.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install settings repro test test-slow check audit smoke same format preset base ui \
    experiments docs dist lock clean

help:  ## list the targets (default)
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/\1	\2/p' $(MAKEFILE_LIST) | \
	    while IFS='	' read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done

install: $(STAMP) settings  ## set up .venv only; PYTHON=/path/to/python chooses the interpreter

# If .venv's interpreter is missing or too old, .venv is created again. If uv fails, pip installs
# the same packages more slowly. In a zip download without .git, DVC needs core.no_scm.
$(STAMP): requirements.lock pyproject.toml
	@set -eu; \
	fit='import sys; sys.exit(sys.version_info < (3, 11))'; \
	if ! .venv/bin/python -c "$$fit" 2>/dev/null; then \
	    found=; \
	    for python in $(PYTHON); do \
	        if "$$python" -c "$$fit" 2>/dev/null; then found=$$python; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "None of these is CPython >= 3.11: $(PYTHON). Install a newer Python, or type its path:" >&2; \
	        echo "  make install PYTHON=/path/to/python3.11" >&2; \
	        exit 1; \
	    fi; \
	    "$$found" -m venv --clear .venv; \
	fi; \
	if .venv/bin/python -m pip install --quiet --disable-pip-version-check '$(UV)' \
	    && VIRTUAL_ENV="$(CURDIR)/.venv" uv pip sync --require-hashes --compile-bytecode \
	        requirements.lock; then :; \
	else \
	    echo "uv failed; continuing with pip"; \
	    .venv/bin/python -m pip install --disable-pip-version-check --no-deps --require-hashes \
	        -r requirements.lock; \
	fi; \
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    --no-build-isolation -e .; \
	if [ ! -e .git ]; then .venv/bin/dvc config --local core.no_scm true; fi; \
	touch $@

# `dvc exp push` reads .dvc/config from a commit, where the store's relative path leads to /artifacts.
# So .dvc/config.local, which git ignores, has the full path. Another address there stays as it is.
# MLflow's store has full paths, too; if the folder was moved, they are mended.
settings: $(STAMP)
	@set -eu; \
	case "$$(sed -n 's/^ *url = //p' .dvc/config.local .dvc/config 2>/dev/null | head -n 1)" in \
	    "$(CURDIR)/artifacts") ;; \
	    ../artifacts|/*/artifacts) dvc remote modify --local store url "$(CURDIR)/artifacts" ;; \
	esac; \
	if [ -f mlflow.db ]; then python -m stages.runtime.moved; fi; \
	if [ -e .git ] && ! { git config user.name && git config user.email; } >/dev/null; then \
	    echo "Git does not know who you are, so \`dvc exp run\` would end in \"unexpected error\". Type:"; \
	    echo "  git config user.name 'Your Name'"; \
	    echo "  git config user.email you@example.com"; \
	fi

repro: $(STAMP) settings  ## run the pipeline with params.yaml, from data to report
	@python -m compileall -q contradiff stages
	@dvc pull models/tiny || { \
	    echo "The base model is missing in DVC's store (artifacts/, or the address in .dvc/config)." >&2; \
	    echo "Restore the store, or retrain the base model: make base (hours on a CPU, minutes on a GPU)." >&2; \
	    exit 1; }
	dvc repro

# Two processes with one thread each: enough for two cores and 24 GB of memory.
test: $(STAMP)  ## run the tests, except the slow ones, in two processes
	python -m pytest -n 2 --dist worksteal

test-slow: $(STAMP)  ## run only the slow tests
	python -m pytest -m slow

check: $(STAMP)  ## check style, format, types, import order, and that dvc.yaml agrees with the code
	ruff check .
	ruff format --check .
	basedpyright
	lint-imports
	python -m pytest -q tests/test_pipeline.py

audit: $(STAMP)  ## look up known vulnerabilities of the pinned packages (needs a network)
	python .ci/audit

smoke: $(STAMP)  ## run the pipeline with presets/smoke.yaml, in a temporary copy
	python -m bench smoke

same: $(STAMP)  ## compare losses and metrics with those of a commit: make same REV=<commit>
	python -m bench same $(REV)

format: $(STAMP)  ## sort imports, fix lint errors where possible, format
	ruff check --fix-only .
	ruff format .

preset: $(STAMP)  ## write params.yaml: make preset NAME=paper, or NAME=own DATA=folder
	@contradiff preset "$(NAME)" $(if $(DATA),--data "$(DATA)")

# dvc.yaml freezes this stage, so that `dvc repro -f` does not retrain the base by accident.
base: $(STAMP)  ## retrain the tiny base model (hours on a CPU, minutes on a GPU); then `dvc push pretrain_base`
	python -m stages.pretrain_base
	dvc commit -f pretrain_base

ui: $(STAMP) settings  ## start MLflow's web pages on this machine (takes up to a minute)
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --host 127.0.0.1 --workers 1

# DVC shows a column for each parameter and each dependency; this leaves those that differ.
experiments: $(STAMP)  ## DVC's experiments: scores and changed parameters; ARGS='--md': as Markdown
	@dvc exp show --only-changed --drop '(build|models|metrics|stages|contradiff)/' $(ARGS)

docs: $(STAMP)  ## build the documentation in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

dist: $(STAMP)  ## build the wheel and the source archive in dist/
	rm -rf dist
	uv build --no-build-isolation --python .venv/bin/python

lock: $(STAMP)  ## pin the dependencies in requirements.lock; ARGS=--upgrade: take the newest versions
	uv pip compile pyproject.toml --extra pipeline --extra bench --extra demo --group dev --group docs --universal --python-version 3.11 \
	    --generate-hashes --no-annotate --no-header \
	    -o requirements.lock -q $(ARGS)

clean:  ## remove build/, checkpoints and caches (`dvc checkout` restores build/)
	rm -rf build dist site .work .pytest_cache .ruff_cache .hypothesis .import_linter_cache .grimp_cache *.egg-info
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
