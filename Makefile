# `make demo`, `make demo-strong`, `make demo-diffusion` and `make test` do all set-up by themselves; they need Python 3.11 and nothing else.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
SEED ?= 0

.PHONY: demo demo-strong demo-diffusion test test-fast lint clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	# torch first: with it in place nothing later replaces its build
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Pretrain, protect, export, audit and report on bundled images; SEED=1 repeats it with another seed.
demo: $(VENV)/.installed
	$(BIN)/sophon pretrain experiment=quickstart seed=$(SEED)
	$(BIN)/sophon protect experiment=quickstart seed=$(SEED)
	$(BIN)/sophon audit experiment=quickstart seed=$(SEED) workers=2
	$(BIN)/sophon report run_dir=runs/quickstart/seed$(SEED)/audit
	$(BIN)/sophon export checkpoint=runs/quickstart/seed$(SEED)/protect audit=runs/quickstart/seed$(SEED)/audit out=runs/quickstart/seed$(SEED)/export

# The same with a real budget and thirty attacks.
demo-strong: $(VENV)/.installed
	$(BIN)/sophon pretrain experiment=quickstart_strong seed=$(SEED)
	$(BIN)/sophon protect experiment=quickstart_strong seed=$(SEED)
	$(BIN)/sophon audit experiment=quickstart_strong seed=$(SEED) workers=2
	$(BIN)/sophon report run_dir=runs/quickstart_strong/seed$(SEED)/audit
	$(BIN)/sophon export checkpoint=runs/quickstart_strong/seed$(SEED)/protect audit=runs/quickstart_strong/seed$(SEED)/audit out=runs/quickstart_strong/seed$(SEED)/export

# The same for a denoising diffusion model, which also draws images.
demo-diffusion: $(VENV)/.installed
	$(BIN)/sophon pretrain experiment=quickstart_diffusion seed=$(SEED)
	$(BIN)/sophon protect experiment=quickstart_diffusion seed=$(SEED)
	$(BIN)/sophon sample experiment=quickstart_diffusion seed=$(SEED)
	$(BIN)/sophon audit experiment=quickstart_diffusion seed=$(SEED) workers=2
	$(BIN)/sophon report run_dir=runs/quickstart_diffusion/seed$(SEED)/audit
	$(BIN)/sophon export checkpoint=runs/quickstart_diffusion/seed$(SEED)/protect audit=runs/quickstart_diffusion/seed$(SEED)/audit out=runs/quickstart_diffusion/seed$(SEED)/export

# Everything that has to hold: lint, format, types, walls and all tests.
test: $(VENV)/.installed lint
	$(BIN)/pytest -n 2 --dist loadfile

# The inner loop of work: all tests but those marked slow.
test-fast: $(VENV)/.installed
	$(BIN)/pytest -m 'not slow' -n 2 --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) runs
