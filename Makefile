PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo reproduce report test check clean

demo: $(VENV)/.experiments  ## the paper's Table 1 and Figure 2 in small: set up, then about two minutes
	$(BIN)/koopt reproduce de-solver --quick --output results/demo

reproduce: $(VENV)/.experiments  ## the same in full: 25 seeds, 60,000 steps
	$(BIN)/koopt reproduce de-solver --output results/de-solver

report: $(VENV)/.experiments  ## every experiment of the paper and one page of them all
	$(BIN)/koopt reproduce all --output results/all

test: $(VENV)/.test  ## set up and run the tests
	$(BIN)/python -m pytest

check: $(VENV)/.dev  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# One stamp for each set of extras, renewed when what they need changes.
$(VENV)/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV)
