PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALL := --quiet -c constraints.txt
CASE ?= demo

# Hundreds of short processes start here: each would compile all of the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo setup test lint format docs bench clean

demo: $(INSTALLED)  ## Cluster scikit-learn's handwritten digits: images and results go to demo/
	$(BIN)/python -m icce_ray.run

setup: $(INSTALLED)  ## Everything installed into .venv

# A core for each of the two processes: with more threads they would wait for each other.
test: export OMP_NUM_THREADS = 1
# In one go, since each process takes seconds for its imports and its Ray; in order: the short unit tests come last.
test: $(INSTALLED)  ## All tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)  ## The guides and the API as web pages, in site/
	$(BIN)/python -m pip install $(INSTALL) -e ".[docs]"
	$(BIN)/python -m mkdocs build --quiet --strict

bench: $(INSTALLED)  ## One benchmark case: make bench CASE=accuracy
	$(BIN)/python benchmarks/run.py $(CASE)

clean:
	rm -rf demo site $(VENV)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(INSTALL) uv
	@# uv takes half of the time, but knows nothing of pip's own settings, such as a mirror: then pip goes on.
	$(BIN)/uv pip install --python $(BIN)/python --native-tls --compile-bytecode $(INSTALL) -e ".[dev]" || \
		$(BIN)/python -m pip install $(INSTALL) -e ".[dev]"
	touch $@
