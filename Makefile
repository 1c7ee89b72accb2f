# Everything a fresh clone needs. The main job only calls verbs that a user would type.
#   make report            install on first use, run the main job, end with reports/index.html
#   make test              install on first use, run the whole test suite
#   make lint              ruff (lint and format) and mypy
#   make TORCH_INDEX=URL … take torch from a pip index of your choice (CPU or CUDA builds)
#   make SYSTEM_TORCH=1 …  use the torch that the system's python3 already has
#   make venv-libero       a simulator's own environment beside .venv (docs/simulators.md); also venv-simpler, venv-calvin
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLM := $(BIN)/vlm4vla
WALK := runs/walk
TORCH_VERSION := 2.13.0
STAMP := $(VENV)/.installed
# Pins are exact, torch's aside where the system brings its own.
CONSTRAINTS := $(if $(SYSTEM_TORCH),$(VENV)/constraints-without-torch.txt,constraints.txt)

.PHONY: install report walk miniature test lint clean venv-libero venv-simpler venv-calvin nano
install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(if $(SYSTEM_TORCH),--system-site-packages) $(VENV)
	$(if $(SYSTEM_TORCH),grep -v '^torch==' constraints.txt > $(CONSTRAINTS))
	$(if $(SYSTEM_TORCH),,$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		torch==$(TORCH_VERSION) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --constraint constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint $(CONSTRAINTS)
	touch $@

# A simulator's environment is a layer over .venv: it finds the project and its libraries there and holds only what the
# simulator needs on top, so two simulators with pins of their own stand side by side, and neither touches .venv.
.PRECIOUS: .venv-%/.layer
.venv-%/.layer: $(STAMP)
	$(BIN)/python -m venv $(if $(SYSTEM_TORCH),--system-site-packages) .venv-$*
	.venv-$*/bin/python -c "import pathlib, sysconfig; \
		place = pathlib.Path(sysconfig.get_path('purelib')); \
		below = '$(CURDIR)/$(VENV)' + str(place).removeprefix('$(CURDIR)/.venv-$*'); \
		(place / 'layer.pth').write_text(f'import site; site.addsitedir({below!r})\n')"
	sed '1s|.*|#!$(CURDIR)/.venv-$*/bin/python|' $(BIN)/vlm4vla > .venv-$*/bin/vlm4vla
	chmod +x .venv-$*/bin/vlm4vla
	touch $@

# LIBERO's own requirements resolve to 205 packages with a source build; these are the ones it really imports.
LIBERO_STAMP := .venv-libero/.installed
venv-libero: $(LIBERO_STAMP)
$(LIBERO_STAMP): .venv-libero/.layer constraints-libero.txt
	.venv-libero/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-libero.txt
	touch $@

# ManiSkill 3's Bridge tasks; where the system's Vulkan driver is too old, a newer one of the distribution's backports is
# unpacked beside it, within the environment.
SIMPLER_STAMP := .venv-simpler/.installed
venv-simpler: $(SIMPLER_STAMP)
$(SIMPLER_STAMP): .venv-simpler/.layer constraints-simpler.txt
	.venv-simpler/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-simpler.txt
	.venv-simpler/bin/python -m vlm4vla_core.sims.simpler.driver .venv-simpler/vulkan
	touch $@

# CALVIN has no package: the simulator is a checkout that the user names (CALVIN_ROOT); this is the physics under it.
CALVIN_STAMP := .venv-calvin/.installed
venv-calvin: $(CALVIN_STAMP)
$(CALVIN_STAMP): .venv-calvin/.layer constraints-calvin.txt
	.venv-calvin/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-calvin.txt
	touch $@

# The main job: demonstrations -> VLA and VLM arms -> rollouts -> features and probes -> divergence -> correlation; a
# nano VLM as a policy; then the reports. Every verb does nothing when its product is there and its inputs have not changed.
TASKS := --tasks move touch
ROLLOUTS := --benchmark tabletop-tasks@1 $(TASKS) --episodes 50
START := $(WALK)/vla/checkpoints/step-000000
report: $(STAMP)
	$(MAKE) --no-print-directory --jobs 2 walk miniature
	$(VLM) report all --out reports

walk: $(STAMP)
	$(VLM) record tabletop $(TASKS) --episodes 800 --out $(WALK)/demos
	$(VLM) train tiny --data $(WALK)/demos --out $(WALK)/vla
	$(VLM) train tiny --data $(WALK)/demos --out $(WALK)/vlm --objective language
	$(VLM) evaluate random $(ROLLOUTS) --out $(WALK)/eval/random
	$(VLM) evaluate zero $(ROLLOUTS) --out $(WALK)/eval/zero
	$(VLM) evaluate mean-action --data $(WALK)/demos $(ROLLOUTS) --out $(WALK)/eval/mean-action
	$(VLM) evaluate scripted $(ROLLOUTS) --out $(WALK)/eval/scripted
	$(VLM) evaluate $(START) $(ROLLOUTS) --out $(WALK)/eval/untrained
	$(VLM) evaluate $(WALK)/vla $(ROLLOUTS) --out $(WALK)/eval/vla
	$(VLM) features $(START) --data $(WALK)/demos --pool grid --max-frames 1500 --out $(WALK)/features-start
	$(VLM) features $(WALK)/vla --data $(WALK)/demos --pool grid --max-frames 1500 --out $(WALK)/features-trained
	$(VLM) probe $(WALK)/features-trained --against $(WALK)/features-start --data $(WALK)/demos \
		--target gripper_xyz --json $(WALK)/probe.json
	$(VLM) similarity $(WALK)/features-trained $(WALK)/features-start --json $(WALK)/similarity.json
	$(VLM) diverge --base $(START) --vlm $(WALK)/vlm --vla $(WALK)/vla \
		--vlm-data $(WALK)/demos --vla-data $(WALK)/demos --out $(WALK)/divergence
	$(VLM) correlate --json $(WALK)/correlate.json --plot $(WALK)/correlate.png

# Beside the walk, on a core of its own: the cell of the miniature study that is run here.
miniature: $(STAMP)
	$(VLM) study run studies/nano.toml --jobs 1

# The nano VLMs of data/nano from nothing: scenes, three stages each, tabletop-vqa@1, shipping; resumable.
nano: $(STAMP)
	$(BIN)/python data/nano/make.py --jobs 2

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile --durations=10

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What `make report` made, and nothing else; needed when a newer version or other settings refuse to go on from it.
clean:
	rm -rf $(WALK) reports/*/ reports/index.html
