# `make demo`, `make demo-strong`, `make demo-diffusion` and `make test` do all set-up by themselves; they need Python 3.11 and nothing else.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
SEED ?= 0

.PHONY: demo demo-strong demo-diffusion protected controls test test-fast lint clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	# torch first: with it in place nothing later replaces its build
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# One of the demos. What the audit compares with, `controls`, needs the reference alone: the second core makes it while the
# first protects, and the audit takes it over.
RUN = runs/$(EXPERIMENT)/seed$(SEED)
define demo
	$(BIN)/sophon pretrain experiment=$(1) seed=$(SEED)
	$(MAKE) --jobs=2 protected controls EXPERIMENT=$(1) SEED=$(SEED)
	$(BIN)/sophon audit experiment=$(1) seed=$(SEED) workers=2 attack.reuse=[runs/$(1)/seed$(SEED)/controls]
	$(BIN)/sophon export checkpoint=runs/$(1)/seed$(SEED)/protect audit=runs/$(1)/seed$(SEED)/audit out=runs/$(1)/seed$(SEED)/export
endef

protected:
	$(BIN)/sophon protect experiment=$(EXPERIMENT) seed=$(SEED)

controls:
	$(BIN)/sophon audit experiment=$(EXPERIMENT) seed=$(SEED) checkpoint=$(RUN)/pretrain run_dir=$(RUN)/controls \
		attack.roles=[unprotected,scratch] >/dev/null

# Pretrain, protect, audit and export on bundled images; SEED=1 repeats it with another seed.
demo: $(VENV)/.installed
	$(call demo,quickstart)

# The same with a real budget and thirty attacks.
demo-strong: $(VENV)/.installed
	$(call demo,quickstart_strong)

# The same for a denoising diffusion model, which also draws images.
demo-diffusion: $(VENV)/.installed
	$(call demo,quickstart_diffusion)
	$(BIN)/sophon sample experiment=quickstart_diffusion seed=$(SEED)

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
