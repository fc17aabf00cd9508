# `make help` lists the targets. Each makes .venv when it is missing, installs what it needs at the versions of
# constraints.txt, and does neither again until pyproject.toml or constraints.txt changes. pip's own settings
# (PIP_EXTRA_INDEX_URL and so on) are honoured.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --constraint constraints.txt --build-constraint constraints.txt
PYTHONS := python3.13 python3.12 python3.11 python3
PINS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test lint docs clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*  ## /  make \1\t/p' Makefile

demo: $(VENV)/.runtime  ## train on handwritten digits on the CPU (minutes), evaluate, write a report
	@$(BIN)/chela train digits

test: lint  ## lint, then every test (GPU tests where there is a GPU)
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=worksteal

lint: $(VENV)/.dev  ## style, format, types, import order of the layers, spelling
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyrefly check
	@$(BIN)/lint-imports
	@$(BIN)/codespell

docs: $(VENV)/.docs  ## build the documentation into site/
	@$(BIN)/zensical build --clean

clean:  ## remove .venv, caches and built files; runs/ stays
	rm -rf $(VENV) site dist build .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.pip:
	@for python in $(PYTHONS); do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "make: chela needs Python 3.11 or newer; none of these runs or is new enough: $(PYTHONS)" >&2; exit 1; \
	fi; \
	echo "making $(VENV) with $$found"; \
	"$$found" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@$(PIP) install --quiet --upgrade --constraint constraints.txt pip
	@touch $@

$(VENV)/.runtime: $(VENV)/.pip $(PINS)
	@echo "installing chela (torch is the large part)"
	@$(INSTALL) --editable '.[plot]'
	@touch $@

$(VENV)/.dev: $(VENV)/.pip $(PINS)
	@echo "installing chela and its development tools (torch and triton are the large parts)"
	@$(INSTALL) --editable '.[plot,data,hf]' --group dev
	@touch $@ $(VENV)/.runtime

$(VENV)/.docs: $(VENV)/.pip $(PINS)
	@echo "installing the documentation tools"
	@$(INSTALL) --group docs
	@touch $@
