# Every command of the project. `make` alone lists them.

VENV   := .venv
PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,$(if $(shell $(name) -c 'import sys; print(sys.version_info >= (3, 11) or "")' 2>/dev/null),$(name))) python3)
RUN    := $(VENV)/bin/python

# Passed on to the command: make test ARGS="tests/api -k stream", make logs NAME=worker-gpt
ARGS ?=
NAME ?=

.DEFAULT_GOAL := help
.PHONY: help install install-dev models up down status logs test test-long faults faults-long mutants simulate fuzz-api fuzz-parsers check format bench clean

help: ## List the commands
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  \033[1mmake %-12s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  Settings go behind the command or into .env: make up SWITCHYARD_PORT=8081 (see .env.example)"

install: ## Install everything that runs into .venv (done by itself before the other commands)
	@$(PYTHON) local/install.py

install-dev: ## Install what tests and checks need as well
	@$(PYTHON) local/install.py --dev

models: install ## Prepare the small models that switchyard.yaml names
	@$(RUN) -m local.models

up: install ## Start everything on this machine and print a key and a first call
	@$(RUN) -m local.stack up

down: ## Stop everything; data and keys are kept
	@if [ -x $(RUN) ]; then $(RUN) -m local.stack down; fi

status: install ## Show processes, models and queues
	@$(RUN) -m local.stack status

logs: install ## Follow the logs of all processes, or of those whose name starts with NAME
	@$(RUN) -m local.stack logs $(NAME)

test: install-dev ## Run the tests against real servers and real small models (15 to 25 min on two cores)
	@$(RUN) -m local.models --all
	$(RUN) -m pytest --reruns 1 -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-long: install-dev ## Test what takes minutes: more clients with real models, LiteLLM, OpenAI's agents, vLLM's load generator, dying engines
	@$(RUN) -m local.models --all
	$(RUN) -c "from benchmarks.peers import *; install_litellm(DEFAULT_FOLDER); install_agents(DEFAULT_FOLDER)"
	$(RUN) -m pytest -m long tests/backends tests/e2e $(ARGS)

faults: install-dev ## Break a stack on purpose and check what was promised (12 min)
	@$(RUN) -m local.models --all
	@$(RUN) -m tests.faults $(ARGS)

faults-long: install-dev ## As faults, with every row and many repetitions (about an hour)
	@$(RUN) -m local.models --all
	@$(RUN) -m tests.faults --long $(ARGS)

mutants: install-dev ## Seed faults into the code and the history: the checker must catch each
	$(RUN) -m pytest -m faults tests/faults

simulate: install-dev ## Play schedules of crashes and losses through the core; ARGS, e.g. "--seeds 100000"
	@$(RUN) -m tests.simulation $(ARGS)

fuzz-api: install-dev ## Send requests made from the API's description, many of each (6 min)
	SWITCHYARD_FUZZ_EXAMPLES=200 $(RUN) -m pytest -rP tests/e2e/test_openapi.py $(ARGS)

fuzz-parsers: install-dev ## Feed what is read with text from outside twenty times the examples of make test, all new (10 min)
	SWITCHYARD_FUZZ_FACTOR=20 $(RUN) -m pytest -n auto --timeout 3600 --hypothesis-show-statistics $(ARGS) \
		tests/api/test_any_input.py tests/api/test_decoding.py tests/api/test_fingerprints.py tests/tasks/test_event_codec.py

check: install-dev ## Check format, lint, types and the direction of imports
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

format: install-dev ## Format the code and apply safe fixes
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

bench: install-dev ## Run the benchmarks; ARGS names one of them
	@$(RUN) -m local.models --all
	$(RUN) -m benchmarks $(ARGS)

clean: down ## Remove the environment and all caches; data and models are kept
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis *.egg-info build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
