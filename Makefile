# Everything runs inside .venv, installed under constraints.txt; nothing is assumed of the machine but Python >= 3.11.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Installed: what the demo needs, and what development needs on top.
TRAIN  := $(VENV)/.train
DEV    := $(VENV)/.dev
SITE   := $(VENV)/.site
PIP    := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
# What pip would do on one core, less what is hardly ever imported (a third of it) and is compiled when it is; some files
# of others are templates, which do not compile.
RARE    := /(tests?|testing|pip|setuptools)/|/transformers/models/
COMPILE := $(BIN)/python -m compileall -q -j 0 -x '$(RARE)' $(VENV)/lib >/dev/null 2>&1 || true
# Tests run in parallel processes: one thread each, or they fight over the cores.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n auto --dist worksteal

.PHONY: help demo test tests test-heavy test-device test-device-training test-browser test-recipes coverage lint docs \
        bench results compatibility faults clean
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "logsnr needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

$(TRAIN): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[train]'
	@$(COMPILE)
	touch $@

# All of the former and more, in one installation.
$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[dev]'
	@$(COMPILE)
	touch $(TRAIN) $@

$(SITE): pyproject.toml constraints.txt | $(DEV)
	$(PIP) -e '.[docs]'
	touch $@

demo: $(TRAIN) ## train, measure and sample a model of real digits; ends with runs/demo/report.html
	$(BIN)/logsnr demo

lint: $(DEV) ## ruff and strict type checking
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Types take one core for a minute: beside the tests, since those alone leave it idle at their ends.
test: $(DEV) ## lint, type-check and test (at most 8 minutes on two cores)
	@$(MAKE) --no-print-directory -j2 lint tests

tests: $(DEV) ## the tests alone
	$(PYTEST)

test-heavy: $(DEV) ## what `make test` leaves out: the same theorems on more networks, levels and sizes (minutes)
	$(PYTEST) -m heavy

coverage: $(DEV) ## all tests, heavy ones too, and which lines they reach (at least 90 %)
	$(PYTEST) -m 'heavy or not heavy' --cov --cov-report=term-missing:skip-covered --cov-fail-under=90

# LOGSNR_DEVICE=cuda:1 takes another device.
test-device: $(DEV) ## checks on this machine's accelerator: equal to the CPU, half precision, compiled, speed (minutes)
	$(BIN)/pytest -s tests/device_checks.py

test-device-training: $(DEV) ## training on it: images/s, share of its peak, memory; fp16, bf16, compiled, resumed (ten minutes)
	$(BIN)/pytest -s tests/device_training.py

docs: $(SITE) ## the site, into site/: no broken link; and every block of code of README and docs, as printed (minutes)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	$(PYTEST) -m 'heavy or not heavy' tests/test_site.py tests/test_docs.py tests/test_readme.py

# CHROMIUM=... takes another browser than Debian's.
test-browser: $(SITE) ## the site and the pages of reports in a browser: accessible, wide and narrow, light and dark, alone
	$(PIP) -e '.[browser]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir runs/browser/site
	$(BIN)/python tests/browser_pages.py runs/browser
	BROWSER_PAGES=runs/browser $(BIN)/pytest tests/browser_checks.py

bench: $(DEV) ## timings side by side with peers; quiet machine, please
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/trainer_overhead.py
	$(BIN)/python benchmarks/trainer_overhead.py --accumulate 2
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/trainer_overhead.py --processes 2
	$(BIN)/python benchmarks/sampling_overhead.py
	$(BIN)/python benchmarks/scheduler_overhead.py

# On the smallest model; docs/papers.md has the commands of larger ones.
results: $(DEV) ## the papers' experiments that are cheap, as docs/results/ge-*.md (half an hour)
	for name in ge_schedules ge_gammas ge_table ge_errors; do \
	  $(BIN)/python benchmarks/papers/$$name.py --model zoo:digits --data digits || exit 1; done

test-recipes: $(DEV) ## every recipe: what it takes, and twenty steps of it on drawn images (minutes)
	$(PYTEST) tests/test_recipes.py -m 'heavy or not heavy' --durations=30

compatibility: $(DEV) ## every pipeline and scheduler class of diffusers; writes docs/compatibility.md; all families (minutes)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=tests $(BIN)/python -W ignore -m compatibility
	$(PYTEST) tests/families_checks.py

# KINDS="..." runs some of them.
faults: $(DEV) ## kill, fill, damage and interrupt things; writes the table of docs/reliability.md (minutes)
	PYTHONPATH=tests $(BIN)/python -m faults $(KINDS)

clean: ## forget the environment and caches
	rm -rf $(VENV) site .mypy_cache .ruff_cache .coverage*
