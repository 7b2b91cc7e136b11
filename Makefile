# Everything lives inside the checkout: the environment, caches, temporary files and runs. Its path may have spaces, so
# programs are named relative to it, and what has its path in it is quoted.
SHELL   := /bin/bash
PYTHON  ?= python3
CACHE   := $(CURDIR)/.cache
BIN     := .venv/bin
STAMP   := .venv/.ready

export PIP_CACHE_DIR            := $(CACHE)/pip
export XDG_CACHE_HOME           := $(CACHE)
export HF_HOME                  := $(CACHE)/huggingface
export MPLCONFIGDIR             := $(CACHE)/matplotlib
export TORCHINDUCTOR_CACHE_DIR  := $(CACHE)/inductor
export NUMBA_CACHE_DIR          := $(CACHE)/numba
export TRITON_CACHE_DIR         := $(CACHE)/triton
export TMPDIR                   := $(CACHE)/tmp
export PYTHONPYCACHEPREFIX      := $(CACHE)/pycache
# Containers forbid it; then every worker would compile every test anew.
export PYTHONDONTWRITEBYTECODE  :=
export HYPOTHESIS_STORAGE_DIRECTORY := $(CACHE)/hypothesis
# pip asks rustc for its version; where that is rustup's, it writes settings.
export RUSTUP_HOME              := $(CACHE)/rustup
export HF_HUB_OFFLINE           ?= 1

# A place for pytest, beside which what the last run left is removed: some disks take long to forget ten thousand files.
define fresh
@mkdir -p "$(TMPDIR)"; old=$$(mktemp -d "$(TMPDIR)/old.XXXXXX"); mv "$(TMPDIR)/pytest" "$$old" 2>/dev/null; \
  rm -rf "$(TMPDIR)"/old.* >/dev/null 2>&1 &
endef

.PHONY: setup demo serve test test-fast vllm-test lint types layers clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "retnet needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@mkdir -p "$(TMPDIR)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	@mkdir -p "$(TMPDIR)"
	@$(BIN)/retnet demo configs/demo.toml --run-dir runs/demo

serve: setup
	@$(BIN)/retnet serve runs/demo

test: lint types layers
	$(fresh)
	$(BIN)/python -m pytest -n auto --dist loadfile --basetemp="$(TMPDIR)/pytest" -o cache_dir="$(CACHE)/pytest"

test-fast: setup
	$(fresh)
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow" --basetemp="$(TMPDIR)/pytest" -o cache_dir="$(CACHE)/pytest"

# Outside the gate, in an environment of its own (3 GB): vLLM's build for the CPU, and the plugin.
VLLM    := $(CACHE)/vllm

vllm-test: $(VLLM)/.ready
	VLLM_NO_USAGE_STATS=1 VLLM_CONFIG_ROOT="$(CACHE)/vllm-config" "$(VLLM)/bin/python" -m pytest integrations/vllm/tests -p no:cacheprovider -W ignore --basetemp="$(TMPDIR)/pytest-vllm"

$(VLLM)/.ready: integrations/vllm/pyproject.toml pyproject.toml
	@mkdir -p "$(TMPDIR)"
	@test -x "$(VLLM)/bin/python" || $(PYTHON) -m venv "$(VLLM)"
	"$(VLLM)/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[fast,hf]' -e 'integrations/vllm[cpu]' pytest
	@# They come along for pictures and sound, and those on PyPI do not fit torch's build for the CPU.
	"$(VLLM)/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch "$@"

lint: setup
	$(BIN)/ruff check --cache-dir "$(CACHE)/ruff"
	$(BIN)/ruff format --check --cache-dir "$(CACHE)/ruff"

types: setup
	$(BIN)/mypy --cache-dir "$(CACHE)/mypy"

layers: setup
	$(BIN)/lint-imports --cache-dir "$(CACHE)/import-linter"

clean:
	rm -rf .venv .cache
