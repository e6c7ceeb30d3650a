# make demo  - both training runs of the demo, then the figure and its summary
# make test  - lint, types and all tests
# Both set up .venv first, from PyPI alone, and do nothing where that is done already.
# make sglang - SGLang without CUDA in .venv/sglang (1.7 GB), where rollouts and tests find it
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

.PHONY: demo test lint setup sglang clean
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

# SGLang's server in an environment of its own, with what it imports: the rest of its dependencies (4 GB) is for CUDA.
# patches/README.md says what the .pth file is for, and which other versions there are.
SGLANG_VERSION ?= 0.5.23
SGLANG := $(VENV)/sglang$(if $(filter-out 0.5.23,$(SGLANG_VERSION)),-$(SGLANG_VERSION))
SGLANG_PIP := $(SGLANG)/bin/python -m pip install --quiet --disable-pip-version-check
SGLANG_STUBS := $(CURDIR)/patches/sglang_cpu
SGLANG_OTHER := $(wildcard patches/sglang_cpu/requirements-$(SGLANG_VERSION).txt)
ifneq ($(SGLANG_VERSION),0.5.23)
$(if $(SGLANG_OTHER),,$(error SGLANG_VERSION=$(SGLANG_VERSION) has no patches/sglang_cpu/requirements-$(SGLANG_VERSION).txt))
endif

sglang: $(SGLANG)/installed

$(SGLANG)/installed: patches/sglang_cpu/requirements.txt patches/sglang_cpu/requirements-no-deps.txt $(SGLANG_OTHER)
	@test -x $(SGLANG)/bin/python || $(PYTHON) -m venv $(SGLANG)
	@echo "sglang 1/2: torch (a minute or two the first time)"
	@$(SGLANG_PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@echo "sglang 2/2: SGLang, its router and what they import"
	@$(SGLANG_PIP) --no-deps --requirement patches/sglang_cpu/requirements-no-deps.txt
	@$(SGLANG_PIP) --requirement patches/sglang_cpu/requirements.txt
	@$(if $(SGLANG_OTHER),$(SGLANG_PIP) --no-deps --requirement $(SGLANG_OTHER))
	@$(SGLANG)/bin/python -c 'import sys, sysconfig; from pathlib import Path; \
		pth = Path(sysconfig.get_path("purelib"), "sglang_cpu.pth"); \
		pth.write_text(sys.argv[1] + "\nimport sglang_cpu_stubs\n")' $(SGLANG_STUBS)
	@touch $@

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

test: lint $(VENV)/megatron-core-0.19.2 $(VENV)/triton $(SGLANG)/installed
	@MEGATRON_CORE_OTHER=$(VENV)/megatron-core-0.19.2 TRITON_OTHER=$(VENV)/triton $(BIN)/python -m pytest

clean:
	rm -rf $(VENV) runs
