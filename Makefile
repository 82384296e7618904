PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
WORKERS ?= 2

.PHONY: install quickstart test test-all export readme outputs clean

$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	touch $@

install: $(STAMP)                 ## a virtual environment with the package and its tools

quickstart: $(STAMP)              ## the main job, offline, on the CPU: text -> concepts -> two models -> scored report
	$(BIN)/lcm-nb quickstart $(ARGS)

test: $(STAMP)                    ## every notebook and every test but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-all: $(STAMP)                ## the slow ones too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --slow

export: $(STAMP)                  ## notebooks -> lcm_nb/, README.md; clean notebooks
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python nbs/readme.py

readme: $(STAMP)                  ## README.md from nbs/index.ipynb
	$(BIN)/python nbs/readme.py

outputs: $(STAMP)                 ## run every notebook and keep what it shows
	$(BIN)/python nbs/outputs.py
	$(BIN)/nbdev_clean
	$(BIN)/python nbs/readme.py
