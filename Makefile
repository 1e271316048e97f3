# Everything a newcomer types. Needs make and Python 3.11 or newer; the rest goes into .venv

PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
UV := $(shell uv --version >/dev/null 2>&1 && echo uv)
BIN := .venv/bin
READY := .venv/.installed

KIT := --quiet -e '.[dev]'
ifdef UV
  NEW_VENV = uv venv --quiet --clear --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" .venv
  INSTALL = uv pip install --python $(BIN)/python $(KIT)
else
  NEW_VENV = $(PYTHON) -m venv --clear .venv
  # uv, brought into .venv, is several times faster than pip, which does it where uv cannot
  INSTALL = { $(BIN)/python -m pip install --quiet uv && $(BIN)/uv pip install --python $(BIN)/python $(KIT); } \
    || $(BIN)/python -m pip install $(KIT)
endif

.PHONY: help setup demo lab notebooks site test test-all

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | expand -t 12

setup: $(READY) ## make .venv and install the project and its tools

demo: $(READY) ## calibration passes from a teacher to a student, in a minute; DATA=cifar10 or cifar100 for photographs, SEEDS=1 for a look
	@$(BIN)/kdc_demo $(if $(DATA),--data "$(DATA)") $(if $(SEEDS),--seeds "$(SEEDS)")

lab: $(READY) ## open the notebooks in JupyterLab
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/jupyter lab nbs/index.ipynb

notebooks: $(READY) ## run every notebook, keep its outputs, make README.md
	@$(BIN)/python nbs/_build.py run
	@$(BIN)/python nbs/_build.py readme

site: $(READY) ## the notebooks as web pages with sliders in _site, to read without Jupyter and without a network
	@$(BIN)/python nbs/_site.py

test: $(READY) ## the notebooks' own tests, then tests/
	@$(BIN)/python nbs/_build.py test

test-all: $(READY) ## the same and the long tests
	@$(BIN)/python nbs/_build.py test --all

# The stamp goes first and comes last: after a set-up that was killed there is none, and .venv is made anew.
$(READY): settings.ini setup.py pyproject.toml
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'kdc_nb needs Python 3.11 or newer: make setup PYTHON=/path/to/python3.11'; exit 1; }
	@echo "Setting up .venv: about 6 GB, torch's CUDA build among them, will be downloaded and unpacked. Minutes, once."
	@test -f $@ || $(NEW_VENV)
	@rm -f $@
	@$(INSTALL)
	@$(BIN)/python nbs/_build.py jupyter
	@if git rev-parse --git-dir >/dev/null 2>&1; then git config --local include.path ../.gitconfig; fi
	@touch $@
