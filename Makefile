# Two commands matter: `make demo` and `make test`. Each uses the virtual environment that is active, or
# PYTHON=path/to/python where given, or else makes .venv and installs into it (once).

ifdef PYTHON
PY := $(PYTHON)
ENVIRONMENT := check-environment
else ifdef VIRTUAL_ENV
PY := $(VIRTUAL_ENV)/bin/python
ENVIRONMENT := check-environment
else
PY := $(CURDIR)/.venv/bin/python
ENVIRONMENT := .venv/installed
endif

FOLDERS := contract pruning export runtime calibration
PATCHSIEVE := $(PY) -m patchsieve
NEEDS := torch transformers accelerate onnx onnxruntime tokenizers pytest xdist ruff mypy psutil
INSTALL := -e .[dev]
DEMO := examples/demo_model
SCENE := $(DEMO)/scene.png
QUESTION := Which texture has the cross?
OTHER := Which texture has the purple star?
SOURCES := $(shell find patchsieve contract pruning export -name '*.py')

.PHONY: help check-environment demo test test-all lint lint-ruff format types bench accuracy gpu cases clean

help:
	@echo "make demo    export the demo model pruned, ask it about a picture"
	@echo "make test    run the tests but the slow ones;  make test-all: run all"
	@echo "make lint    ruff and mypy;  make format: let ruff rewrite;  make types: mypy alone"
	@echo "make bench   run the benchmarks;  make clean: remove what these targets made"
	@echo "make accuracy  what every method costs the demo model in answers (ACCURACY='--tables main')"
	@echo "make gpu     on a GPU: settle what is unproven, compare with the CPU, measure (GPU='--only bench')"
	@echo "make cases   run every case_*.py of a folder on this checkout (CASES=folder)"

check-environment:
	@$(PY) -c "import importlib.util as u, sys; \
	    lacks = [n for n in '$(NEEDS)'.split() if not u.find_spec(n)]; \
	    lacks and sys.exit(f'$(PY) lacks {\", \".join(lacks)}: $(PY) -m pip install $(INSTALL)')"

.venv/installed: setup.py
	@echo "making .venv: torch and the rest, about 2 GB with a CPU build of torch, once" >&2
	@test -x .venv/bin/python || python3 -m venv .venv
	@.venv/bin/python -m pip install -qq torch==2.13.0
	@.venv/bin/python -m pip install -qq --editable ".[cpu,rtx,export,dev]"
	@touch $@

# A bundle holds the plan "none" too, so one bundle answers pruned and unpruned.

demo/bundle/manifest.json: $(DEMO)/atp/model.safetensors $(SOURCES) | $(ENVIRONMENT)
	@rm -rf demo/bundle
	@$(PATCHSIEVE) export $(DEMO)/atp -o demo/bundle --method atp --max-text-tokens 64 --max-new-tokens 32 > /dev/null

demo: demo/bundle/manifest.json
	@$(PATCHSIEVE) run demo/bundle --image $(SCENE) --prompt "$(QUESTION)" \
		--max-new-tokens 16 --json > demo/pruned.json
	@$(PATCHSIEVE) run demo/bundle --image $(SCENE) --prompt "$(QUESTION)" \
		--max-new-tokens 16 --json --plan none > demo/full.json
	@$(PY) examples/show_answers.py demo/pruned.json demo/full.json
	@$(PATCHSIEVE) show demo/bundle --image $(SCENE) --prompt "$(QUESTION)" --prompt "$(OTHER)" \
		--max-new-tokens 16 --quiet -o demo/page.html

test: $(ENVIRONMENT)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n logical --dist loadfile -m "not slow" $(TESTS)

test-all: $(ENVIRONMENT)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n logical --dist loadfile $(TESTS)

lint: lint-ruff types

lint-ruff: $(ENVIRONMENT)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: $(ENVIRONMENT)
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

# mypy knows no package_dir: it reads the installed shape from a tree of links.
types: $(ENVIRONMENT)
	@rm -rf build/types && mkdir -p build/types/patchsieve
	@ln -s $(CURDIR)/patchsieve/* build/types/patchsieve/
	@for folder in $(FOLDERS); do ln -s $(CURDIR)/$$folder build/types/patchsieve/$$folder; done
	@cd build/types && $(PY) -m mypy --config-file $(CURDIR)/pyproject.toml -p patchsieve

bench: $(ENVIRONMENT)
	@for file in benchmarks/bench_*.py; do test ! -e $$file || $(PY) $$file || exit 1; done

accuracy: $(ENVIRONMENT)
	@$(PY) -m benchmarks.accuracy $(ACCURACY)

# A machine that only measures has no linters; what each target needs beside these, doctor says.
gpu: NEEDS := torch transformers onnx onnxscript onnxruntime safetensors tokenizers jinja2 PIL pytest
gpu: INSTALL := -e .[gpu,export] pytest
gpu: $(ENVIRONMENT)
	@$(PY) -m benchmarks.gpu $(GPU)

# Scripts that each try one situation and exit 0 where the answer is right; all run, then it fails.
# They call $$PATCHSIEVE/.venv/bin/patchsieve.
cases: $(ENVIRONMENT)
	@test -n "$(CASES)" || { echo "name the folder of the scripts: make cases CASES=folder" >&2; exit 2; }
	@ls "$(CASES)"/case_*.py >/dev/null 2>&1 || { echo "no case_*.py in $(CASES)" >&2; exit 2; }
	@bad=0; for file in "$(CASES)"/case_*.py; do \
	    if said=$$(PATCHSIEVE=$(CURDIR) $(PY) "$$file" 2>&1); then echo "right  $$(basename "$$file")"; \
	    else bad=1; echo "WRONG  $$(basename "$$file")"; printf '%s\n' "$$said" | sed 's/^/    /'; fi; \
	done; exit $$bad

clean:
	@rm -rf build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
