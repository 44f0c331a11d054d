# make train and make test do all set-up on a machine with Python 3.10 to 3.14 and make; nothing else is needed.
PYTHON ?= $(shell for version in 3.11 3.12 3.13 3.14 3.10 3; do command -v python$$version && break; done)
STACK ?= $(shell if command -v nvidia-smi >/dev/null 2>&1; then echo cuda; else echo cpu; fi)
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready-$(STACK)
RUNS ?= runs/quickstart
# Every process that a test starts would compile all sources again.
unexport PYTHONDONTWRITEBYTECODE
# Without --no-compile pip compiles 16,000 files on one core, most of which nothing here loads.
PIP_INSTALL = pip install --quiet --disable-pip-version-check --no-compile
# The shell starts what runs beside it deaf to Ctrl-C.
COMPILE = 'import signal; signal.signal(signal.SIGINT, signal.default_int_handler); \
	from ssr_rec.kernels.extension import load; load()'

.PHONY: setup setup-spark setup-notebooks setup-onnx train test test-forms test-slow test-faults lint docs format clean

setup: $(READY)

# The stamp is as new as what was installed; the sources are linked, not copied, so edits need no reinstall.
$(READY): requirements/$(STACK).txt requirements/no-deps.txt pyproject.toml
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 15))' || \
		{ echo "error: Python 3.10 to 3.14 is needed, and '$(PYTHON)' is not; install one, such as by" \
		"apt install python3.12 python3.12-venv, or set PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
		{ echo "error: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install" \
		"python$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv" >&2; exit 2; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	@echo "pip takes minutes, and says nothing meanwhile; 6 GB instead of 3 where it finds torch's CUDA build alone."
	$(BIN)/$(PIP_INSTALL) --constraint requirements/$(STACK).txt torch numpy
	@echo "The C++ operators are compiled once for each version of torch, in about a minute, while pip goes on."
	@PYTHONPATH=. $(BIN)/python -c $(COMPILE) & compiling=$$!; \
		$(BIN)/$(PIP_INSTALL) -r requirements/$(STACK).txt && $(BIN)/$(PIP_INSTALL) --no-deps -r requirements/no-deps.txt \
		&& $(BIN)/$(PIP_INSTALL) --no-deps --no-build-isolation --editable .; installed=$$?; \
		wait $$compiling || installed=$$?; exit $$installed
	$(BIN)/python -c 'from ssr_rec.common.versions import check_stack; check_stack()'
	touch $@

# Extras of pyproject.toml that are not part of the set-up: spark, some 430 MB besides Java, notebooks, which runs
# examples/ as such, and onnx. The slow tests use those that are there.
EXTRAS = spark notebooks onnx
$(EXTRAS:%=setup-%): setup-%: $(VENV)/.ready-%

$(EXTRAS:%=$(VENV)/.ready-%): $(VENV)/.ready-%: $(READY)
	$(BIN)/$(PIP_INSTALL) --no-build-isolation --editable '.[$*]'
	touch $@

# The synthetic log, SSR-S and a Dense MLP of equal size, side by side: about three minutes on two cores.
train: setup
	rm -rf $(RUNS)
	PATH="$(CURDIR)/$(BIN):$$PATH" torchx run dist.ddp -j 1x2 ssr_rec/train.py --config configs/synthetic_ssr_s.yaml \
		--runs=$(RUNS) --name=ssr_s
	PATH="$(CURDIR)/$(BIN):$$PATH" torchx run dist.ddp -j 1x2 ssr_rec/train.py --config configs/synthetic_mlp.yaml \
		--runs=$(RUNS) --name=mlp
	$(BIN)/python tools/show_runs.py $(RUNS)/ssr_s $(RUNS)/mlp --plot $(RUNS)/comparison.png

test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m "not slow and not faults and not gpu"

# The kernels as machines with fewer vector instructions run them; make test has run this machine's own form.
test-forms: setup
	@set -e; for form in $$($(BIN)/python -c 'import torch; forms = ["DEFAULT", "AVX2", "AVX512"]; \
		own = torch.backends.cpu.get_cpu_capability(); print(*forms[:forms.index(own)] if own in forms else "")'); do \
		echo "ATEN_CPU_CAPABILITY=$$form"; ATEN_CPU_CAPABILITY=$$(echo $$form | tr A-Z a-z) $(BIN)/python -m pytest -n auto \
		--maxprocesses 4 --dist worksteal -m "not slow and not gpu" tests/kernels tests/serving/test_serving_model.py; done

test-slow: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m "slow and not faults and not gpu and not spark"
	$(BIN)/python -m pytest -m "slow and spark"

test-faults: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 2 --dist worksteal -m "faults and not gpu"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site of docs/ and of the docstrings in build/docs; a broken link or an argument that is not there fails.
docs: .venv-docs/.ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

.venv-docs/.ready: requirements/docs.txt
	rm -rf .venv-docs
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/$(PIP_INSTALL) -r requirements/docs.txt
	touch $@

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-docs build runs data .mypy_cache .pytest_cache .ruff_cache
