# Everything a fresh clone needs. The main job only calls verbs that a user would type.
#   make report            install on first use, run the main job, end with reports/index.html
#   make test              install on first use, run the whole test suite
#   make lint              ruff (lint and format) and mypy
#   make TORCH_INDEX=URL … take torch from a pip index of your choice (CPU or CUDA builds)
#   make SYSTEM_TORCH=1 …  use the torch that the system's python3 already has
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLM := $(BIN)/vlm4vla
WALK := runs/walk
TORCH_VERSION := 2.13.0
STAMP := $(VENV)/.installed
# Pins are exact, torch's aside where the system brings its own.
CONSTRAINTS := $(if $(SYSTEM_TORCH),$(VENV)/constraints-without-torch.txt,constraints.txt)

.PHONY: install report test lint notebooks clean
install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(if $(SYSTEM_TORCH),--system-site-packages) $(VENV)
	$(if $(SYSTEM_TORCH),grep -v '^torch==' constraints.txt > $(CONSTRAINTS))
	$(if $(SYSTEM_TORCH),,$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		torch==$(TORCH_VERSION) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --constraint constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint $(CONSTRAINTS)
	touch $@
