# One command for each thing a newcomer does; the environment is made on first use. `make help` lists them.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help train test compile lint bench figures docs environment clean

PYTHON := .venv/bin/python
ARGS ?=

help: ## show this list
	@echo 'usage: make TARGET [ARGS="..."]    ARGS goes to the program that the target runs'
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  \1\t\2/p' Makefile | expand -t 16
	@echo 'settings (environment or command line):'
	@printf '%s\n' '  JATTN_PYTHON=PATH              the Python to make .venv with, instead of the one found' \
	  '  JATTN_ACCELERATOR=cpu|cuda13   the build of jax to install, instead of the one this machine calls for'

train: environment ## train on real text; on a CPU also report how memory grows with length
	$(PYTHON) train.py $(ARGS)

# The workers share one GPU where there is one: none may take its memory in advance.
test: export XLA_PYTHON_CLIENT_PREALLOCATE := false
test: environment ## run the tests (those that need a GPU are left out without one)
	$(PYTHON) -m pytest -n auto --maxprocesses 8 --dist loadgroup $(ARGS)

compile: export JATTN_COMPILERS := required
compile: environment ## compile the GPU kernels for GPUs that are not there, and check what comes out
	@sh scripts/compilers.sh
	$(PYTHON) -m pytest -n auto --maxprocesses 8 -m compile $(ARGS)

lint: environment ## check style, format and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

bench: environment ## time attention on this machine next to its peers
	$(PYTHON) benchmarks/attention.py $(ARGS)

figures: environment ## draw the figures and write the tables of README and docs from benchmarks/results
	$(PYTHON) benchmarks/plot.py
	$(PYTHON) benchmarks/tables.py

docs: environment ## build the documentation in site/; its pages' code runs, and a warning is an error
	rm -rf site build/docs
	$(PYTHON) -m sphinx --builder html --fail-on-warning --keep-going --quiet --jobs auto \
	  --doctree-dir build/docs/doctrees $(ARGS) docs build/docs/site
	mv build/docs/site site
	@echo 'open site/index.html'

environment: ## make or update .venv and nothing else
	@sh scripts/environment.sh

clean: ## remove .venv, .compilers and every cache (runs/ stays)
	rm -rf .venv .compilers build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
