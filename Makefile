# make demo  - both training runs of the demo, then the figure and its summary
# make test  - lint, types and all tests
# Both set up .venv first, from PyPI alone, and do nothing where that is done already.
#
# On Linux PyPI's torch is the CUDA build (several GB). For the small CPU build:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
RUN := $(BIN)/megatron-rlvr train examples/countdown/demo.yaml

.PHONY: demo test lint setup clean
.DELETE_ON_ERROR:

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml sandbox/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=…")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setup 1/2: torch (a minute or two the first time)"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@echo "setup 2/2: megatron-rlvr, rlvr-sandbox and what they need"
	@$(PIP) --editable sandbox --editable '.[dev]'
	@touch $@

# The newest Megatron-Core wants Python 3.12 on paper; the policy is tested on it from 3.11 too, beside the installed one.
$(VENV)/megatron-core-0.19.2: | $(VENV)/installed
	@$(PIP) --no-deps --ignore-requires-python --target $@ megatron-core==0.19.2

# Triton lies apart from the installed packages, which behave differently where they find it.
$(VENV)/triton: | $(VENV)/installed
	@$(PIP) --no-deps --target $@ triton==3.9.0

demo: $(VENV)/installed
	@echo "demo 1/3: plain GRPO"
	@$(RUN) entropy.recipe=none run.dir=runs/demo/grpo
	@echo "demo 2/3: entropy-guided Positive-Advantage Reweighting"
	@$(RUN) entropy.recipe=par run.dir=runs/demo/par
	@echo "demo 3/3: report"
	@$(BIN)/megatron-rlvr report runs/demo/grpo runs/demo/par --output runs/demo

lint: $(VENV)/installed
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/mypy
	@cd sandbox && ../$(BIN)/mypy --strict rlvr_sandbox

test: lint $(VENV)/megatron-core-0.19.2 $(VENV)/triton
	@MEGATRON_CORE_OTHER=$(VENV)/megatron-core-0.19.2 TRITON_OTHER=$(VENV)/triton $(BIN)/python -m pytest

clean:
	rm -rf $(VENV) runs
