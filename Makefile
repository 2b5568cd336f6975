# Each target is the command of the same name: `make loadtest RATE=5` is `deepseek loadtest --rate 5`.
# `make` lists the main targets, `make help-all` all of them, `make help-loadtest` the variables of one.
# No logic here: cli/commands/ declares commands and variables, export/pipeline.py the stages of a build.
SHELL := /bin/sh
VENV ?= .venv
.DEFAULT_GOAL := help
# Goals run in the given order, even with -j: `make engine serve`, `make loadtest verdict`.
.NOTPARALLEL:

# Any Python can start the set-up, which finds the right one. It takes milliseconds if there is nothing to do.
ANY_PYTHON = $(firstword $(wildcard $(VENV)/bin/python) $(shell command -v $(or $(PYTHON),python3) python3.11 python3.12 python3.13))
SET_UP = @$(or $(ANY_PYTHON),python3) -S cli/environment.py --venv "$(VENV)"
DEEPSEEK = @exec "$(VENV)/bin/python" -m cli --make

# ---- what users do --------------------------------------------------------------------------------
COMMANDS := demo new import engine serve doctor keys stack kubernetes infer metadata parity \
    loadtest verdict report capacity regression tune profile simulate-scale release retrain rollback releases plan \
    clean clean-cache
.PHONY: $(COMMANDS)
demo engine release retrain: NEEDS = $(if $(filter tensorrt_rtx,$(TARGET)),rtx) $(if $(NATIVE),tensorrt)
$(COMMANDS):
	$(SET_UP) $(NEEDS)
	$(DEEPSEEK) $@

# ---- work on this repository ----------------------------------------------------------------------
DEVELOP := check test test-all lint docs bench bench-peers measure-failure measure-training lock check-engine gpu-check
.PHONY: $(DEVELOP)
$(DEVELOP): NEEDS = test
check-engine: NEEDS = rtx
test test-all measure-failure: NEEDS = test checkov system
$(DEVELOP):
	$(SET_UP) $(NEEDS)
	$(DEEPSEEK) $@

# ---- set-up and help ------------------------------------------------------------------------------
.PHONY: setup distclean help help-all
setup:
	$(SET_UP) $(NEED)

distclean:
	$(if $(wildcard $(VENV)/bin/python),$(DEEPSEEK) $@,@echo "note: no $(VENV), so what was built stays; make setup first" >&2)
	rm -rf "$(VENV)"

help help-all:
	@$(or $(ANY_PYTHON),python3) -m cli --make $@

help-%:
	@$(or $(ANY_PYTHON),python3) -m cli --make $* --help

# ---- former names ---------------------------------------------------------------------------------
.PHONY: compare compare-runs
compare: parity
	@echo "note: make compare is now make parity" >&2
compare-runs: regression
	@echo "note: make compare-runs is now make regression" >&2
