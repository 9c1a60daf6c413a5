# Everything a person or CI runs. Needs git, make and Python 3.11, 3.12 or 3.13; each target works in a fresh clone.
# `make study PRESET=factory ARGS="--trials 20"` passes options on.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help help-cluster env study test test-cluster test-faults soak lint audit ui bench lock clean

VENV := .venv
BIN := $(VENV)/bin
PRESET ?= quick
ARGS ?=
PYTHON ?=
STORAGE ?= $(or $(STUDY_STORAGE),$(CURDIR)/runs)
LOCK := requirements.lock
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PACKAGES := study trainables search_spaces
CLUSTER := $(addprefix cluster/,aws.yaml gcp.yaml onprem.yaml kuberay.yaml slurm.sbatch fake.yaml mlflow/server.sh \
  mlflow/compose.yaml Dockerfile)

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "On a cluster:"
	@for file in $(CLUSTER); do printf '  %-27s %s\n' $$file "$$(sed -n '/^# /{s/^# //;s/[.:].*//;p;q;}' $$file)"; done

help-cluster: ## the three commands that use each file of cluster/
	@awk 'FNR == 1 {print (NR > 1 ? "\n" : "") FILENAME; head = 1; on = 0} !/^#/ {head = 0} \
	  head && /^#   [1-3]  / {on = 1} head && /^#( [^ ]|$$)/ {on = 0} head && on {print substr($$0, 3)}' $(CLUSTER)

# The lock is its own stamp: nothing happens while the copy in .venv equals it. pip brings uv, with the hash that the
# same lock gives it, and uv brings the rest in a fraction of pip's time. Registries are what pip and uv are set up
# for; where only pip is (a company's mirror), pip does it all.
env: ## build .venv from requirements.lock; does nothing when it is up to date
	@if cmp -s $(LOCK) $(VENV)/$(LOCK) && $(BIN)/python -c '' 2>/dev/null; then exit 0; fi; \
	python=; \
	for candidate in $(or $(PYTHON),python3 python3.12 python3.11 python3.13); do \
	  if "$$candidate" -c '$(SUPPORTED)' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "error: $(or $(PYTHON),python3) is $$($(or $(PYTHON),python3) -V 2>&1 | head -n 1); needed is Python 3.11, 3.12 or" \
	    "3.13: install one, or name one with 'make PYTHON=/path/to/python3.12 ...'" >&2; exit 2; \
	elif ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	  echo "error: $$python has no venv module: install it (on Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 2; \
	fi; \
	echo "building $(VENV) from $(LOCK): once, about a minute and 7 GB"; \
	rm -f $(VENV)/$(LOCK); \
	$(BIN)/python -c '$(SUPPORTED)' 2>/dev/null || "$$python" -m venv --clear $(VENV); \
	awk '/^[^ ]/ {keep = /^uv==/} keep' $(LOCK) > $(VENV)/uv.lock; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r $(VENV)/uv.lock; \
	$(BIN)/uv pip sync --quiet --require-hashes --compile-bytecode --python $(BIN)/python $(LOCK) || { \
	  echo "uv could not install; trying pip, which takes several minutes" >&2; \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r $(LOCK); }; \
	cp $(LOCK) $(VENV)/$(LOCK)

study: env ## run (or resume) a study: PRESET=quick, ARGS="--trials 20"
	@$(BIN)/python study/run.py --preset $(PRESET) $(ARGS)

test: lint ## the formatter check, the linter, the type checker and every test but those of test-cluster and test-faults
	@$(BIN)/python -m pytest -m "not cluster and not faults" $(ARGS)

test-cluster: env ## the tests that start clusters of several nodes, with sshd in network namespaces where it may be had; CI runs test, then this
	@$(BIN)/python -m pytest -m cluster tests/cluster -o faulthandler_timeout=1800 $(ARGS)

test-faults: env ## 10,000 garbage inputs, and faults injected into real studies and servers
	@$(BIN)/python -m pytest -m faults -o faulthandler_timeout=900 $(ARGS)

soak: env ## 200 short trials with a fault every minute; ARGS="--trials 60" for fewer
	@$(BIN)/python tests/study/soak.py $(ARGS)

lint: env ## formatter check, linter, type checker, and whether every locked package has its version and hash
	@failed=; \
	$(BIN)/ruff format --check . || failed=1; \
	$(BIN)/ruff check . || failed=1; \
	$(BIN)/mypy || failed=1; \
	$(BIN)/uv pip sync --quiet --offline --dry-run --require-hashes --python $(BIN)/python $(LOCK) || failed=1; \
	test -z "$$failed"

# The verdict changes with the day and not with the code, so that lint does not depend on it.
audit: env ## look every locked package up among the known vulnerabilities; asks the package registry and api.osv.dev
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	printf '[project]\nname = "audited"\nversion = "0"\nrequires-python = ">=3.11,<3.14"\n' > "$$folder/pyproject.toml"; \
	$(BIN)/uv add --quiet --no-sync --project "$$folder" -r $(LOCK); \
	$(BIN)/uv audit --quiet --project "$$folder" --locked

ui: env ## MLflow's pages for the studies in runs/, on 127.0.0.1
	@case " $(ARGS)" in *" --host"*|*" -h"*) echo "error: these pages ask nobody for a password, so they stay on 127.0.0.1;" \
	  "for others run cluster/mlflow/server.sh, or ssh -L 5000:127.0.0.1:5000 to this machine" >&2; exit 2;; esac
	@test -f "$(STORAGE)/mlflow.db" || { echo "error: no study in $(STORAGE) yet: run 'make study' first" >&2; exit 2; }
	@MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui --workers 1 --host 127.0.0.1 \
	  --backend-store-uri "sqlite:///$(STORAGE)/mlflow.db" --artifacts-destination "$(STORAGE)/mlartifacts" $(ARGS)

bench: env ## measure what matters against a comparator; ARGS="knn cache" for some; JSON lines in runs/bench.jsonl
	@$(BIN)/python tests/bench/run.py $(ARGS)

lock: env ## write requirements.lock from pyproject.toml; ARGS=--upgrade takes the newest versions allowed
	@$(BIN)/uv pip compile --quiet $(ARGS) --universal --fork-strategy fewest --generate-hashes --no-emit-index-url --no-emit-find-links \
	  --python-version 3.11 --extra dev --extra cluster --extra hf --custom-compile-command "make lock" pyproject.toml -o $(LOCK)

clean: ## remove .venv and every cache; studies in runs/ stay
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	@find $(PACKAGES) tests -name __pycache__ -type d -prune -exec rm -rf {} +
