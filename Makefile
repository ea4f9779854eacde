# Each target does its own set-up: .venv, then the packages of requirements.txt, once.
#
#   make setup      only this set-up
#   make run        the whole job on the embedded demo corpus, offline
#   make test       the quick tests and the linters
#   make test-slow  the tests that take longer, and those that need a GPU where there is one
#   make lint       ruff and mypy
#   make bench      tokens/s and utilization of this machine
#   make gpu-report  a training step on an H100 and the memory of all stages, computed without one;
#                    RECIPE=... names a recipe
#   make gpu-check  on a machine with a GPU: its tests, measured beside computed steps, a short run
#   make bench-quant  methods of quantization compared, on models that it trains first
#   make clean      remove .venv and caches; data, logs and records stay
#
# PYTHON=... names the interpreter that .venv is made from; otherwise it is the first that has torch
# 2.9 or later of python3.11, python3.12 and python3, or else the first of them. A torch that it has
# (built for the machine's GPU, say) is used as it is; otherwise the pinned one is installed.

SHELL := /bin/sh
PYTHON ?=
RUN := .venv/bin/python
READY := .venv/.requirements-installed
PYTEST_ARGS ?=

# Prints the folder that holds torch if it is new enough.
OWN_TORCH := import os, torch; \
	version = tuple(map(int, torch.__version__.split(".")[:2])); \
	version >= (2, 9) and print(os.path.dirname(os.path.dirname(torch.__file__)))

.DEFAULT_GOAL := help
.PHONY: help setup run test test-slow lint bench bench-quant gpu-report gpu-check clean

help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

setup: $(READY)

run: $(READY)
	@$(RUN) records/records.py demo

LINT := $(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m mypy

# The linters run beside the tests; their output comes last.
test: $(READY)
	@log=$$(mktemp); { $(LINT); } >$$log 2>&1 & lint=$$!; \
	trap 'kill $$lint; rm -f $$log; exit 130' INT TERM; \
	$(RUN) -m pytest -n 2 $(PYTEST_ARGS); tests=$$?; \
	wait $$lint; linters=$$?; cat $$log; rm -f $$log; \
	exit $$((tests | linters))

test-slow: $(READY)
	$(RUN) -m pytest -m "slow or gpu" $(PYTEST_ARGS)

lint: $(READY)
	$(LINT)

bench: $(READY)
	@$(RUN) tests/bench.py

bench-quant: $(READY)
	@$(RUN) tests/bench_quant.py

# Where torch is a CPU build, Triton is not there: it generates the code of the kernels.
TRITON := triton==3.7.1
RECIPE ?= default
REPORT ?= logs/gpu_report.md

gpu-report: $(READY)
	@$(RUN) -c 'import triton' 2>/dev/null || $(RUN) -m pip install --quiet $(TRITON)
	@$(RUN) -m tests.gpu_report $(RECIPE) --out $(REPORT)
	@$(RUN) -m tests.gpu_stages $(RECIPE) >> $(REPORT)
	@cat $(REPORT)

gpu-check: $(READY)
	@$(RUN) -m tests.gpu_check

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.txt
	@set -eu; python=; torch=; \
	for name in $(or $(PYTHON),python3.11 python3.12 python3); do \
		$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
		python=$${python:-$$name}; \
		torch=$$($$name -c '$(OWN_TORCH)' 2>/dev/null) || torch=; \
		if [ -n "$$torch" ]; then python=$$name; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "make: Python 3.11 or 3.12 is needed, found none; name it: make PYTHON=..." >&2; exit 1; \
	fi; \
	if ! $(RUN) -m pip --version >/dev/null 2>&1; then \
		echo "Making .venv from $$python"; \
		$$python -m venv --clear $${torch:+--system-site-packages} .venv; \
	fi; \
	if [ -n "$$torch" ] && ! $(RUN) -c 'import torch' 2>/dev/null; then \
		site=$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
		echo "$$torch" > "$$site/own_torch.pth"; \
	fi; \
	echo "Installing requirements.txt$${torch:+, but for torch: keeping the one in $$torch}"; \
	if [ -n "$$torch" ]; then drop='^torch=='; else drop='^$$'; fi; \
	grep -v "$$drop" requirements.txt > .venv/requirements.txt; \
	$(RUN) -m pip install --quiet --disable-pip-version-check -r .venv/requirements.txt
	@touch $@
