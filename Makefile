PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
WORKERS ?= 2
SONAR_VENV ?= .venv-sonar
SONAR_STAMP := $(SONAR_VENV)/.installed

.PHONY: install quickstart test test-all test-sonar sonar-env bench-sonar export readme outputs clean

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

# The second line's package is this one: lcm_nb also runs in that environment, with what requirements-sonar.txt holds.
$(SONAR_STAMP): requirements-sonar.txt settings.ini setup.py pyproject.toml
	test -x $(SONAR_VENV)/bin/python || $(PYTHON) -m venv $(SONAR_VENV)
	$(SONAR_VENV)/bin/python -m pip install --quiet --requirement requirements-sonar.txt
	$(SONAR_VENV)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

sonar-env: $(SONAR_STAMP)         ## the environment of Meta's package (7 GB; needs libsndfile1)

test-sonar: $(STAMP) $(SONAR_STAMP)  ## both SONAR backends against each other, and speech
	LCM_NB_SONAR_PYTHON=$(abspath $(SONAR_VENV))/bin/python OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_sonar_package.py

bench-sonar: $(STAMP) $(SONAR_STAMP) ## the same models by both backends: sentences a second
	LCM_NB_SONAR_PYTHON=$(abspath $(SONAR_VENV))/bin/python $(BIN)/python benchmarks/sonar_speed.py $(ARGS)

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
