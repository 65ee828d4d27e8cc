# make demo   sets up, then trains the laptop preset and prints what it achieved
# make test   sets up, then lints, checks types and runs the tests, side by side
# make quick  runs the tests that the changes since main touch
# make floors runs the core of the tests with the lowest versions that pyproject.toml allows, in an environment of their
#             own; FLOORS_KEPT="torch==2.13.0" takes these instead
# make setup LOCK=cpu (or cuda) installs what locks/ names, and nothing whose hash is not there; make lock writes it again
# make older  exports models and reads them with transformers 4.57 too, laid over the environment
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

PYTEST := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
FLOORS := .venv-floors
CORE := tests/inference/test_chat_format.py tests/inference/test_model_files.py tests/training/test_checks.py \
	tests/training/test_old_run.py tests/training/models/test_models.py tests/training/models/test_scorers.py \
	tests/training/models/test_adapters.py tests/training/preparation tests/training/step1_sft tests/training/step2_reward

.PHONY: setup demo test pytest quick floors lint lock clean

setup: $(VENV)/.ready$(LOCK)

$(VENV)/.ready$(LOCK): requirements.txt pyproject.toml $(if $(LOCK),locks/common.txt locks/$(LOCK).txt)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(LOCK),$(BIN)/python -m pip install --quiet --require-hashes -r locks/build.txt)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet \
		$(if $(LOCK),--require-hashes --no-build-isolation --use-pep517 -r locks/$(LOCK).txt,-r requirements.txt)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@ $(VENV)/.ready

demo: setup
	$(BIN)/rlhf-chat run --model smollm2-135m --name demo

lock: setup
	$(BIN)/python -m pip install --quiet uv==0.13.8
	$(BIN)/python locks/lock.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy rlhf_chat applications training inference

test: setup
	$(MAKE) --jobs=2 lint pytest

pytest: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST)

quick: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST) $$($(BIN)/python -m tests.touched)

floors:
	$(PYTHON) -m venv $(FLOORS)
	$(PYTHON) tests/floors.py $(FLOORS_KEPT) >$(FLOORS)/requirements.txt
	DS_BUILD_OPS=0 $(FLOORS)/bin/python -m pip install --quiet -r $(FLOORS)/requirements.txt
	$(FLOORS)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	OMP_NUM_THREADS=1 $(FLOORS)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(CORE)

older: setup
	test -d $(OLDER) || $(BIN)/python -m pip install --quiet --no-deps --target $(OLDER) \
		'transformers==4.57.*' 'huggingface-hub==0.36.*' 'tokenizers==0.22.*'
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.older_transformers $(OLDER)

clean:
	rm -rf $(VENV) $(FLOORS) $(OLDER) build *.egg-info
