# Six words: demo, test, lint, docs, bench, gpu. Each but the last sets up what it needs on a fresh machine.
# `make real` fetches published tokenizers and one small model into a cache outside the checkout; tests/real/ is
# skipped without them.
# `make test` is what a change must pass; `make test-fast` leaves out the slow ones, for use while you work;
# `make test-thorough` runs its claims on further cases: before a release, and after a change to ranks or resume.
# `make gpu` runs what needs an accelerator, with whatever Python and packages are there.
# `make test-versions` runs the fast tests with each set of releases in constraints/; `make test-oldest` and
# `make test-newest` run what is at the heart of them with one set.
PYTHON ?= python3.11
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
# Python compiles a module when it is first imported; most of what is installed never is.
INSTALL := install --quiet --no-compile
# More workers than cores, since tests wait for processes they start. A file stays with one worker, or the runs that
# its tests share would be made again by each; files come in the order of tests/conftest.py, slow ones first.
WORKERS ?= 4
PYTEST := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Images of containers forbid Python to keep what it compiled. Then each process compiles torch and Transformers anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo real environments compiled test test-fast test-thorough test-versions lint docs bench gpu

RELEASES := $(sort $(patsubst constraints/%.txt,%,$(wildcard constraints/*.txt)))
CORE := tests/test_compat.py tests/trainer tests/safety \
	tests/updates/draws $(patsubst %,tests/updates/test_%.py,collator loader stream update) \
	tests/promise/test_stock_contract.py tests/promise/test_exactness.py

# torch comes first and pinned: an unpinned torch would fetch gigabytes of CUDA libraries.
$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip $(INSTALL) --constraint $(CONSTRAINTS) torch
	$(BIN)/pip $(INSTALL) --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

# DeepSpeed comes as source and asks the torch that is there how to build; none of its kernels are.
$(VENV)/.deepspeed: $(VENV)/.ready
	$(BIN)/pip $(INSTALL) --constraint $(CONSTRAINTS) 'setuptools>=77' wheel
	DS_BUILD_OPS=0 $(BIN)/pip $(INSTALL) --constraint $(CONSTRAINTS) --no-build-isolation deepspeed
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python recipes/sft.py recipes/quickstart.yaml output.overwrite=true

real: $(VENV)/.ready
	$(BIN)/python tests/support/real_parts.py

# One process compiles what four would compile at the same moment: all that tests import, and ranks.
compiled: $(VENV)/.deepspeed
	$(BIN)/python -m pytest -k test_two_ranks_resume_to_the_same_bits

test: $(VENV)/.deepspeed
	$(BIN)/python $(PYTEST)

test-thorough: $(VENV)/.deepspeed
	$(BIN)/python $(PYTEST) -m thorough

test-fast: $(VENV)/.deepspeed
	$(BIN)/python $(PYTEST) -m 'not slow'

# Other releases lie in an environment of their own; what its file does not name comes from the first one.
$(VENV)-%/.ready: constraints/%.txt $(VENV)/.deepspeed
	rm -rf $(@D)
	$(PYTHON) -m venv --without-pip $(@D)
	$(BIN)/pip --python $(@D)/bin/python $(INSTALL) --no-deps --requirement $<
	$(BIN)/python -c "import sysconfig as s; first = s.get_path('purelib'); \
		own = s.get_path('purelib', vars={'base': '$(@D)'}); \
		open(f'{own}/first.pth', 'w').write(f'import site; site.addsitedir({first!r})')"
	touch $@

# What the gate runs in.
environments: $(VENV)/.deepspeed $(VENV)-oldest/.ready $(VENV)-newest/.ready

.PHONY: $(RELEASES:%=test-%)
$(RELEASES:%=test-%): test-%: $(VENV)-%/.ready
	$(VENV)-$*/bin/python $(PYTEST) -m 'not slow' $(CORE)

test-versions: $(RELEASES:%=$(VENV)-%/.ready)
	for release in $(RELEASES); do \
		echo "== $$release"; \
		$(VENV)-$$release/bin/python $(PYTEST) -m 'not slow' || exit 1; \
	done

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Into site/, without the network; a broken link or a docstring that cannot be read is an error.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --site-dir site

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/run.py

# Makes no environment, since its torch would know no CUDA: that of VENV if there is one, else PYTHON as it is.
DEVICE ?= cuda
GPU_RESULTS ?= gpu-results
GPU_PYTHON ?= $(if $(and $(VENV),$(wildcard $(BIN)/python)),$(BIN)/python,$(if \
	$(filter command environment,$(origin PYTHON)),$(PYTHON),python3))

gpu:
	$(GPU_PYTHON) -m benchmarks.gpu --device $(DEVICE) --results $(GPU_RESULTS) $(GPU_OPTIONS)
