# make            the report: set-up, data, executed notebooks, figures, report/report.pdf
# make test       unit tests, and the notebooks compared with what they show when run again
# make grid       train what is missing of the coursework's grid, with three seeds
# make questions  train what is missing of the runs of notebooks/questions.ipynb, and measure their gradients
# make recipe     train what is missing of the runs of notebooks/recipe.ipynb, the most important ones first
# make data       Fashion-MNIST into data/
# make bench      what the fast path is worth on this machine
# make speedrun   how long this machine takes to the coursework's accuracy
# make notebook   run the notebooks and keep what they show (after a change)

PYTHON ?= python3
BIN := .venv/bin
CODE := $(wildcard mixer/*.py mixer/*/*.py mixer/*/*.cpp)
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
RESULTS := $(wildcard results/*.safetensors results/*.json results/*/*.json results/*/*/*.json results/*/*.csv)
EXECUTED := $(NOTEBOOKS:notebooks/%=build/%)

.NOTPARALLEL:  # every notebook has a table in README.md
.PHONY: report test grid questions recipe data bench speedrun notebook clean
.DELETE_ON_ERROR:

report: build/report

# With an argument that apt knows: install it when we may.
APT = if [ "$$(id -u)" = 0 ]; then apt=apt-get; elif sudo -n true 2>/dev/null; then apt="sudo apt-get"; else exit 1; fi; \
	command -v apt-get >/dev/null && $$apt update -qq && DEBIAN_FRONTEND=noninteractive $$apt install -y -qq --no-install-recommends

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12, for instance."; exit 1; }
	@[ ! -e .venv ] || $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo ".venv is broken or of an older Python: run make clean, then make again."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || ($(APT) python3-venv) >/dev/null 2>&1 || \
		{ echo "Python's venv is missing: sudo apt install python3-venv, then run make again."; exit 1; }
	@echo "Installing PyTorch, Jupyter and what they need into .venv: some minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $<
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

data: .venv/installed
	@$(BIN)/python -m mixer.data

grid: .venv/installed
	$(BIN)/python -m mixer.runner --seeds 0 1 2
	$(BIN)/python -m mixer.runner --validation yes

SHORT := $(BIN)/python -m mixer.runner --results results/questions --batch-size 256 --seeds 0 1
PATCHES := $(SHORT) --num-epochs 10 --lr 0.01 --dropout 0.1 --patch-size
LEFT_OUT := $(SHORT) --num-epochs 8 --dropout 0.1
questions: .venv/installed
	$(SHORT) --num-epochs 10 --dropout 0 --num-blocks 1 2 4 8 16 --skip-connections yes no
	$(PATCHES) 2x2 7x7 14x14
	$(PATCHES) 2x2 --patches-mlp-dim 256 --channels-mlp-dim 512 128
	$(PATCHES) 7x7 --patches-mlp-dim 3136 --channels-mlp-dim 512 1568
	$(PATCHES) 14x14 --patches-mlp-dim 12544 --channels-mlp-dim 512 6272
	$(LEFT_OUT) --optimiser sgd momentum rmsprop
	$(LEFT_OUT) --optimiser adamw --weight-decay 0.01
	$(LEFT_OUT) --gelu tanh
	$(LEFT_OUT) --initialisation pytorch
	$(LEFT_OUT) --inputs scaled
	$(SHORT) --seeds 0 --dropout 0.1 --gelu tanh
	$(BIN)/python -m mixer.studies.gradients

# The weights of the last epoch of a recipe's run with seed 0, under the name by which others find them; where they are here.
keep = weights="results/recipe/weights/$$($(BIN)/python -c \
	"import mixer; print(mixer.grid(recipe='$(1)', $(3))[0].name)").last.safetensors"; \
	if [ -e "$$weights" ]; then mkdir -p $(dir $(2)) && cp "$$weights" $(2); fi

RECIPE := $(BIN)/python -m mixer.runner --results results/recipe --recipe
PEER := $(RECIPE) modern --seeds 0 1 --num-epochs 20 --whiten no --initialisation flax --network
WITHOUT := $(RECIPE) modern --seeds 0 1 --num-epochs 20
ORDER := $(BIN)/python -m mixer.runner --batch-size 256 --num-epochs 10 --lr 0.01 --dropout 0.1
MIXERS_AGAIN := $(ORDER) --seeds 3 4 5 6 7 8 9
CONVNETS_AGAIN := $(ORDER) --seeds 3 4 5 --network conv
recipe: .venv/installed
	$(RECIPE) modern --seeds 0 1 2
	$(call keep,modern,results/recipe.safetensors)
	$(BIN)/python -m mixer.studies.label_errors
	$(RECIPE) teacher
	$(call keep,teacher,results/teachers/conv.safetensors)
	$(RECIPE) distilled --seeds 0 1 2
	$(RECIPE) patient --seeds 0 1 2
	$(PEER) mlp
	$(PEER) conv
	$(WITHOUT)
	$(WITHOUT) --optimiser adamw --lr 0.003
	$(WITHOUT) --weight-decay 0
	$(WITHOUT) --schedule constant
	$(WITHOUT) --average 0
	$(WITHOUT) --flip no
	$(WITHOUT) --shift 0
	$(WITHOUT) --mixup 0
	$(WITHOUT) --label-smoothing 0
	$(WITHOUT) --whiten no
	$(WITHOUT) --initialisation flax
	$(BIN)/python -m mixer.studies.shuffle build
	$(ORDER) --seeds 0 1 --results results/recipe --network conv
	$(ORDER) --seeds 0 1 --results results/recipe/shuffled-patches --data build/shuffled-patches --network mixer conv
	$(ORDER) --seeds 0 1 --results results/recipe/shuffled-pixels --data build/shuffled-pixels --network mixer conv
	$(MIXERS_AGAIN) --results results/recipe
	$(MIXERS_AGAIN) --results results/recipe/shuffled-patches --data build/shuffled-patches
	$(CONVNETS_AGAIN) --results results/recipe
	$(CONVNETS_AGAIN) --results results/recipe/shuffled-patches --data build/shuffled-patches

# For students that are tried on the validation split: `--recipe distilled --teacher conv-validation --validation yes`,
# or `patient` with `--num-epochs 60 --mixup 0.5 1`.
results/teachers/conv-validation.safetensors: .venv/installed
	$(RECIPE) teacher --validation yes
	$(call keep,teacher,$@,validation=True)

bench: .venv/installed-dev
	$(BIN)/python -m mixer.studies.bench

speedrun: .venv/installed-dev
	$(BIN)/python -m mixer.studies.speedrun

# The notebooks are run into build/: what is committed stays as it is. They write figures/, report/generated/ and the
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
		{ echo "All is made but the PDF, which needs LaTeX: sudo apt install latexmk texlive-latex-recommended" \
		"texlive-fonts-recommended lmodern, then run make again."; exit 1; }
	@rm -f report/report.aux report/report.bbl report/report.out report/report.fdb_latexmk  # cut short where it was stopped
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
