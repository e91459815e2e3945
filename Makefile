# Every target sets itself up: nothing but python3 (3.11 or newer), pip and make is needed.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Small models want few threads; two pytest workers with one thread each use two cores best.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
WORKERS ?= 2

.PHONY: demo test test-slow test-processes docs docs-check fuzz browser interop release demo-seeds reconstruct federate memory simulate scale roofline reconstruct-speed attacks deploy load check format lint types layers clean

demo: $(STAMP)
	$(BIN)/pomona demo

test: $(STAMP)
	$(BIN)/pytest -n $(WORKERS) --dist loadscope -m "not slow and not processes and not interop and not docs and not browser" $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/pytest -m slow $(PYTEST_ARGS)

test-processes: $(STAMP)
	$(BIN)/pytest -m processes tests/flower $(PYTEST_ARGS)

# the theme's advice about mkdocs 2, which is not what is built with
docs docs-check: export NO_MKDOCS_2_WARNING ?= 1
docs: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict
	@echo 'site/index.html'

docs-check: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/pytest tests/docs $(PYTEST_ARGS)
	$(BIN)/pytest -m processes tests/flower/test_docs.py $(PYTEST_ARGS)

fuzz: export POMONA_FUZZ ?= 20000
fuzz: $(STAMP)
	$(BIN)/pytest tests/flower/test_fuzz.py tests/flower/test_fuzz_sums.py $(PYTEST_ARGS)

# Debian: apt-get install chromium chromium-driver; elsewhere any Chromium with its driver on the PATH
browser: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[browser]'
	npm install --silent --prefix build/axe axe-core@4.10.3
	$(BIN)/pytest -m browser tests/browser $(PYTEST_ARGS)

interop: $(STAMP)
	$(BIN)/python scripts/fetch_llama_cpp.py
	$(BIN)/pytest -m interop tests/interop $(PYTEST_ARGS)

reconstruct: $(STAMP)
	$(BIN)/python benchmarks/reconstruct.py

federate: $(STAMP)
	$(BIN)/python benchmarks/federate.py

memory: $(STAMP)
	$(BIN)/python benchmarks/memory.py

simulate: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[peers]'
	$(BIN)/python benchmarks/simulate.py

attacks: $(STAMP)
	$(BIN)/python benchmarks/attacks.py

deploy: $(STAMP)
	$(BIN)/python benchmarks/deploy.py

load: $(STAMP)
	$(BIN)/python benchmarks/load.py

scale: $(STAMP)
	$(BIN)/python benchmarks/scale.py

roofline: $(STAMP)
	$(BIN)/python benchmarks/roofline.py

reconstruct-speed: $(STAMP)
	$(BIN)/python benchmarks/reconstruct_speed.py

release: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[release]'
	$(BIN)/python scripts/release.py $(RELEASE_ARGS)

demo-seeds: $(STAMP)
	$(BIN)/python benchmarks/demo.py

check: format lint types layers test

format: $(STAMP)
	$(BIN)/ruff format --check .

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/pyright

layers: $(STAMP)
	$(BIN)/lint-imports

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Pomona needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf .venv build dist site
