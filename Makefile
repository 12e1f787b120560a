# make            the report: set-up, data, executed notebooks, figures, report/report.pdf
# make test       unit tests, and a comparison of the notebooks' outputs with a new run
# make grid       train the missing runs of the coursework's grid, with three seeds
# make questions  train the missing runs of notebooks/questions.ipynb, and measure their gradients;
#                 make second-round: those planned in its appendix
# make recipe     train the missing runs of notebooks/recipe.ipynb, the most important ones first;
#                 make trial-speedrun, trial-teachers, trial-students: those on the validation split;
#                 make three-teachers: two more networks, for a teacher of three
#                 make students: the ten with plain last epochs that are planned there
# make data       download Fashion-MNIST into data/
# make bench      measure the fast path on this machine
# make speedrun   measure the time to the coursework's accuracy on this machine
# make notebook   run the notebooks and keep their outputs (after a change)
# make clean      remove build/ and .venv/
# make help       show this list

PYTHON ?= python3
BIN := .venv/bin
CODE := $(wildcard mixer/*.py mixer/*/*.py mixer/*/*.cpp)
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
RESULTS := $(wildcard mixer/weights/*.safetensors results/*.json results/*/*.json results/*/*/*.json results/*/*.csv)
EXECUTED := $(NOTEBOOKS:notebooks/%=build/%)

.NOTPARALLEL:  # every notebook writes a table into README.md
.PHONY: report test grid questions second-round recipe trial-speedrun trial-teachers trial-students three-teachers students data bench speedrun notebook clean help
.DELETE_ON_ERROR:

report: build/report

# Installs the packages named after it with apt, if permitted.
APT = if [ "$$(id -u)" = 0 ]; then apt=apt-get; elif sudo -n true 2>/dev/null; then apt="sudo apt-get"; else exit 1; fi; \
	command -v apt-get >/dev/null && $$apt update -qq && DEBIAN_FRONTEND=noninteractive $$apt install -y -qq --no-install-recommends

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12, for instance."; exit 1; }
	@[ ! -e .venv ] || $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo ".venv is broken or has an older Python: run make clean, then make again."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || ($(APT) python3-venv) >/dev/null 2>&1 || \
		{ echo "Python's venv is missing: sudo apt install python3-venv, then run make again."; exit 1; }
	@echo "Installing PyTorch, Jupyter and their dependencies into .venv takes some minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $<
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

data: .venv/installed
	@$(BIN)/python -m mixer.data

grid questions second-round recipe trial-speedrun trial-teachers trial-students three-teachers students: .venv/installed
	$(BIN)/python -m mixer.studies.experiments $(subst -, ,$@)

bench: .venv/installed-dev
	$(BIN)/python -m mixer.studies.bench

speedrun: .venv/installed-dev
	$(BIN)/python -m mixer.studies.speedrun

# The notebooks run in build/, so the committed ones stay unchanged. They write figures/, report/generated/ and the
# tables of README.md.
build/%.ipynb: notebooks/%.ipynb $(CODE) $(RESULTS) .venv/installed
	@$(BIN)/python -m mixer.data
	$(BIN)/python -m nbconvert --log-level WARN --to notebook --execute --output-dir build $<

notebook: .venv/installed
	@$(BIN)/python -m mixer.data
	$(BIN)/python -m nbconvert --log-level WARN --to notebook --execute --inplace \
		--ExecutePreprocessor.record_timing=False $(NOTEBOOKS)

build/report: $(EXECUTED) $(wildcard report/*.tex report/*.bib)
	@kpsewhich lmodern.sty booktabs.sty microtype.sty >/dev/null 2>&1 && command -v latexmk >/dev/null || \
		($(APT) latexmk texlive-latex-recommended texlive-fonts-recommended lmodern) >/dev/null 2>&1 || \
		{ echo "Everything is made except the PDF, which needs LaTeX: sudo apt install latexmk texlive-latex-recommended" \
		"texlive-fonts-recommended lmodern, then run make again."; exit 1; }
	@rm -f report/report.aux report/report.bbl report/report.out report/report.fdb_latexmk  # perhaps incomplete
	cd report && SOURCE_DATE_EPOCH=0 FORCE_SOURCE_DATE=1 latexmk -pdf -interaction=nonstopmode -halt-on-error -silent report
	@touch $@
	@echo "The report is report/report.pdf; the notebooks as run here are in build/."

test: .venv/installed-dev
	@$(BIN)/python -m mixer.data
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python -m pytest --nbval

clean:
	rm -rf build .venv

help:
	@sed -n '/^#/!q; s/^# //p' $(firstword $(MAKEFILE_LIST))
