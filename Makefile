# PyTorch -> ONNX -> precision -> engine -> Triton -> client -> load test -> verdict. `make` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SECONDARY:
.PHONY: help demo setup engine keys stack doctor serve release rollback releases infer compare metadata loadtest verdict capacity compare-runs tune report profile simulate-scale kubernetes plan bench measure-failure measure-training test lint check-engine \
    built check-graphs can-build lock clean clean-cache distclean FORCE

##@ Variables of a build
MODEL ?= recommender## name of the model's folder
MODELS ?= models## folder of model folders; may lie outside the repository
DATA ?=## a shop's own click log (csv: user,item,timestamp) in place of MovieLens-100K
PRECISION ?= auto## auto, fp32, fp16, int8 or fp8
PRUNE ?=## share of heads and channels to prune, e.g. 0.25 (default: none)
TARGET ?= auto## auto, onnxruntime, tensorrt, tensorrt_rtx or torchscript
TRITON_TAG ?= 26.10## release of NVIDIA's containers, of the engine build and of the server
NATIVE ?=## 1: build tensorrt engines with this machine's own TensorRT, not in the container
ANYWAY ?=## engine: 1: publish even what a gate of make release refused, or what was rolled back

##@ Variables of the server and of who calls it
HTTP_PORT ?= 8000## of the embedded server, and of who calls it
GRPC_PORT ?= 8001## the same
METRICS_PORT ?= 8002## of the embedded server, for Prometheus
POLL_S ?=## serve: look every so many seconds for a version that was released
PROTOCOL ?= grpc## grpc or http
URL ?= 127.0.0.1:$(if $(filter http,$(PROTOCOL)),$(HTTP_PORT),$(GRPC_PORT))## host:port of a server (default: the one on this machine)
CA_CERT ?=## for a URL behind the gateway: build/gateway/ca.crt; the key is in DEEPSEEK_API_KEY
ROW ?= 0## infer: which evaluation sample is sent

##@ Variables of load tests
RATE ?=## requests/s, open loop (default: each rate that the SLO names)
SHAPE ?=## rates that change, open loop: 50x30,50-200x60 (requests/s x seconds)
USERS ?=## closed loop: so many users, each of whom sends when the last request was answered
MIX ?=## several models at once, with weights of their rates: recommender:3,minilm:1
WORKERS ?= 1## processes that send the load; -1: one a core
DURATION_S ?= 30## seconds of a load test
WEB ?=## 1: Locust's own page while the load test runs and after, at WEB_PORT
WEB_PORT ?= 8089## of Locust's page
RUN ?=## verdict, report: folder of a load test (default: the latest)
REQUESTS ?= 1## profile: how many are traced
BUDGET_S ?= 1200## longest time that tune, capacity or compare-runs may take
BASE ?=## compare-runs: repository, model/version, or folder of recorded runs
NEW ?=## compare-runs: what is held against it; release: a repository to release from (default: what is built)
NEW_BUILD ?=## release: the folder that NEW= was built in (default: BUILD)

##@ Variables of the compose stack and of Kubernetes
PROJECT ?= $(call as-before,COMPOSE_PROJECT_NAME,deepseek)## of the compose stack: names its containers, volumes and images (default: as before, at first deepseek)
GATEWAY_PORT ?= $(call as-before,GATEWAY_PORT,8443)## of the compose stack's gateway (default: as before, at first 8443)
GATEWAY_HOSTS ?=## the gateway's names for its certificate, beside localhost
NAME ?=## keys: whom a new API key is for
REVOKE ?=## keys: whose are ended, or which one, by its id
EXPIRES_DAYS ?=## keys: days until a new one ends (default: it does not)
KEY_RPS ?=## keys: requests/s of a new one (default: twice those of the SLOs, at least 100)
REGISTRY ?=## kubernetes: where the cluster pulls the images from
IMAGE_TAG ?=## kubernetes: tag of the images (default: 0.1.0)
MODELS_URL ?=## kubernetes: the repository is fetched from there, as an archive (default: a volume)
AUTOSCALER ?= hpa## kubernetes: hpa, keda or none
TRAFFIC ?= day## simulate-scale: day, spike, launch, flat, or a file of seconds,rate_rps (.csv)
SCALE ?=## simulate-scale: further flags: SCALE='--peak-rps 4000 --node-price 0.38'

##@ Variables of plan
P99_MS ?=## latency that 99 % of RATE= must keep (default: 50)
PRESET ?=## a well-known shape in place of MODEL: bert-base, bert-large, gpt2-xl, gpt3-175b
ONNX ?=## an ONNX file in place of MODEL
LAYERS ?=## a Transformer in place of MODEL, with HIDDEN= and HEADS=
HIDDEN ?=## width of the hidden states
HEADS ?=## attention heads
LENGTH ?=## tokens of a sample
BATCH ?=## samples at once in training (default: 32)
DEVICES ?=## a file of devices in place of deepseek/devices.toml
MEASURE ?=## 1: this machine is measured, too
PLAN ?=## further flags: PLAN='--checkpointing --train-precision bf16 --json'

##@ Variables of places
BUILD ?= build## what is made on the way
REPOSITORY ?= model_repository## what Triton reads
VENV ?= .venv## virtual environment
ENV_FILE ?= .env## what docker compose reads; engine writes it
CACHE ?=## artifacts shared by clones and branches (default: ~/.cache/deepseek-deploy; off: none)
CACHE_GIB ?= 10## what it may hold

# Of the compose stack what ENV_FILE has, which is what runs.
as-before = $(or $(shell sed -n 's/^$(1)=//p' "$(strip $(ENV_FILE))" 2>/dev/null | tail -n 1),$(2))
# A ~ that no shell took up: of quotes, of dash, of a file. On the command line, too.
$(foreach v,MODELS DATA BUILD REPOSITORY CA_CERT RUN BASE NEW NEW_BUILD TRAFFIC ONNX DEVICES,$(eval override $(v) := $$(patsubst ~/%,$$(HOME)/%,$$(strip $$($(v))))))
# Some shells have a NAME of their own, which would make a key.
override NAME := $(if $(filter command,$(firstword $(origin NAME))),$(value NAME))
NAMED := $(if $(filter command environment,$(firstword $(origin MODEL))),$(strip $(MODEL)))
MODEL := $(strip $(MODEL))
PRECISION := $(strip $(PRECISION))
PRUNE := $(strip $(PRUNE))
TARGET := $(strip $(TARGET))
TRITON_TAG := $(strip $(TRITON_TAG))
NATIVE := $(strip $(NATIVE))
HTTP_PORT := $(strip $(HTTP_PORT))
GRPC_PORT := $(strip $(GRPC_PORT))
METRICS_PORT := $(strip $(METRICS_PORT))
PROJECT := $(strip $(PROJECT))
GATEWAY_PORT := $(strip $(GATEWAY_PORT))
ENV_FILE := $(strip $(ENV_FILE))
PROTOCOL := $(strip $(PROTOCOL))
URL := $(strip $(URL))
VENV := $(strip $(VENV))
CACHE := $(strip $(CACHE))
CACHE_GIB := $(strip $(CACHE_GIB))
export BUILD CACHE CACHE_GIB DATA HTTP_PORT GRPC_PORT METRICS_PORT

# Make splits file names at blanks, and `clean` removes what lies under them: what could go wrong is refused at once.
refuse = $(error $(1): seen '$($(1))'; $(2))
$(foreach v,MODEL MODELS BUILD REPOSITORY VENV ENV_FILE,$(if $($(v)),$(if $(word 2,$($(v))),$(call refuse,$(v),a \
    name without blanks is needed)),$(call refuse,$(v),leave it out for the default)))
$(if $(findstring /,$(MODEL))$(filter . ..,$(MODEL)),$(call refuse,MODEL,the name of a folder in MODELS=$(MODELS) is needed))

# A variable for the shell, whatever it holds, and a flag with it where it was given.
quoted = '$(subst ','\'',$(strip $($(1))))'
given = $(if $(strip $($(1))),$(2)=$(call quoted,$(1)))

GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
# tensorrt engines are built in the container of the server's tag, so that both have the same TensorRT: from outside,
# or as we are where that is where we are (docker/export.Dockerfile), or natively where NATIVE=1 asks for it.
INSIDE := $(filter $(TRITON_TAG),$(DEEPSEEK_TRITON_TAG))
CAN_BUILD = $(or $(INSIDE),$(NATIVE),$(shell docker info 2>/dev/null | grep -q nvidia && echo yes))
# The demo serves on the embedded Triton, which has no TensorRT backend.
AUTO_TARGET := $(if $(and $(GPU),$(if $(filter demo,$(MAKECMDGOALS)),,$(CAN_BUILD))),tensorrt,onnxruntime)
T := $(if $(filter auto,$(TARGET)),$(AUTO_TARGET),$(TARGET))
# A word that is no choice is told before anything is made for it.
KNOWN_TARGETS := auto onnxruntime tensorrt tensorrt_rtx torchscript
KNOWN_PRECISIONS := auto fp32 fp16 int8 fp8
$(if $(filter $(TARGET),$(KNOWN_TARGETS)),,$(error TARGET: seen "$(TARGET)"; allowed: $(KNOWN_TARGETS)))
ifneq ($(filter demo engine release check-engine,$(MAKECMDGOALS)),)
$(if $(filter-out $(KNOWN_PRECISIONS),$(PRECISION)),$(error PRECISION: seen "$(PRECISION)"; allowed: $(KNOWN_PRECISIONS)))
endif
# What is not quantized: ONNX Runtime on a CPU has no fast fp16.
HIGH := $(if $(filter onnxruntime,$(T)),fp32,fp16)
PY := $(VENV)/bin/python
B := $(BUILD)/$(MODEL)
# of the server: `compare` calls both of its ports
HOST = $(patsubst %:$(lastword $(subst :, ,$(URL))),%,$(URL))
FOLDER := $(MODELS)/$(MODEL)
WHICH := --model $(MODEL) --models $(MODELS)
ACCESS = $(call given,CA_CERT,--ca-cert)
ON_TARGET := $(PY) -m
ifeq ($(T),tensorrt)
CONTAINER := $(PY) -m export.container --tag $(TRITON_TAG) --models $(MODELS) --
ON_TARGET := $(if $(INSIDE),/opt/export/bin/python -m,$(if $(NATIVE),$(PY) -m,$(CONTAINER)))
endif
ENGINE_NAME := $(if $(filter onnxruntime,$(T)),model.onnx,$(T)/model.$(if $(filter torchscript,$(T)),pt,plan))
ifeq ($(T)-$(PRECISION),torchscript-auto)
override PRECISION := fp32# the one that export.to_torchscript makes
endif

# Goals follow one another as they were named, whatever -j says: serve after engine, verdict after loadtest.
ifeq ($(filter check-graphs,$(MAKECMDGOALS)),)
.NOTPARALLEL:
endif

##@ The main job
demo: engine ## from nothing to a verdict: data, train, export, engine, serve, infer, compare, load test, report
	@$(PY) -m serving.embedded --repository $(REPOSITORY) --http-port $(HTTP_PORT) --grpc-port $(GRPC_PORT) \
	    --metrics-port $(METRICS_PORT) -- $(MAKE) --no-print-directory -k TARGET=$(T) infer compare loadtest report verdict

engine: ## weights, ONNX, precision, engine, model repository; then: docker compose up
	@$(ALONE) $(MAKE) --no-print-directory TARGET=$(T) built

doctor: $(VENV)/.ready ## whether what is in the repository runs here: engines, config.pbtxt, GPU, memory, disk
	@$(PY) -m serving.doctor --repository $(REPOSITORY) --triton-tag $(TRITON_TAG) $(if $(NAMED),--model $(NAMED))

serve: $(VENV)/.ready ## the embedded Triton over the model repository, until Ctrl-C
	@$(PY) -m serving.embedded --repository $(REPOSITORY) --http-port $(HTTP_PORT) --grpc-port $(GRPC_PORT) \
	    --metrics-port $(METRICS_PORT) $(call given,POLL_S,--poll-s)

infer: LEAST_BATCH = $(shell sed -n 's/^LEAST_BATCH := //p' $(B)/spec.mk 2>/dev/null)
infer: $(VENV)/.ready ## send a real sample to the server and show what comes back
	@$(PY) -m deepseek_client infer $(MODEL) --url $(URL) --protocol $(PROTOCOL) --inputs $(B)/evaluation.npz \
	    $(ACCESS) --row $(ROW) --fill $(or $(LEAST_BATCH),1) --top 10 $(if $(wildcard $(B)/labels),--labels $(B)/labels)

compare: $(VENV)/.ready ## what is served over HTTP and gRPC against fp32 PyTorch, at every corner of the profile
	@$(PY) -m export.parity $(WHICH) --url $(HOST):$(GRPC_PORT) --http-url $(HOST):$(HTTP_PORT)

metadata: $(VENV)/.ready ## what the server says of the model
	@$(PY) -m deepseek_client metadata $(MODEL) --url $(URL) --protocol $(PROTOCOL) $(ACCESS)

##@ New versions (make serve POLL_S=2 follows them)
# The server that callers have: one at a URL that was given has to be there.
LIVE = --repository $(REPOSITORY) --url $(URL) --protocol $(PROTOCOL) $(ACCESS) \
    $(if $(filter command environment,$(firstword $(origin URL))),,--may-be-absent)

release: $(VENV)/.ready ## what was built, or NEW=repository: every gate beside the served version, then the switch under load
	@$(if $(strip $(NEW)),,$(ALONE) $(MAKE) --no-print-directory TARGET=$(T) $(B)/choice-$(T).json)
	@$(PY) -m serving.release $(WHICH) $(LIVE) --target $(T) $(call given,NEW,--new) \
	    $(call given,NEW_BUILD,--new-build) --duration-s $(DURATION_S) $(call given,RATE,--rate)

rollback: $(VENV)/.ready ## back to the version before, in seconds
	@$(PY) -m serving.rollback $(WHICH) $(LIVE)

releases: $(VENV)/.ready ## what was released, refused and rolled back
	@$(PY) -m serving.releases $(WHICH) --repository $(REPOSITORY)

##@ The compose stack (docker compose up)
keys: $(VENV)/.ready ## API keys of the gateway: lists them; NAME=shop makes and prints one, REVOKE=shop ends it
	@$(PY) -m serving.keys $(call given,NAME,--name) $(call given,REVOKE,--revoke) $(call given,EXPIRES_DAYS,--expires-days) \
	    $(call given,KEY_RPS,--rate-rps) $(addprefix --host ,$(GATEWAY_HOSTS))

stack: $(VENV)/.ready ## ENV_FILE, limits, certificate, alerts and dashboard for what is in the repository; publishes nothing
	@$(WRITE_STACK)

# What a search found as a page, after its own output and with its own exit status; not every end of one writes anew.
written = $$(stat -c '%i %.Y' $(B)/$(1).json 2>/dev/null)
then-draw = status=$$?; test "$(call written,$(1))" = "$$before" || $(PY) -m loadtests.report $(WHICH) --$(1); exit $$status

##@ Load test
loadtest: $(VENV)/.ready ## measure the server; leaves a folder in build/<model>/loadtests/
	@$(PY) -m loadtests.run $(WHICH) --url $(URL) --protocol $(PROTOCOL) $(ACCESS) --target $(T) --duration-s $(DURATION_S) \
	    $(call given,MIX,--mix) $(call given,RATE,--rate) $(call given,SHAPE,--shape) $(call given,USERS,--users) \
	    --workers $(strip $(WORKERS)) $(if $(strip $(WEB)),--web $(strip $(WEB_PORT)))

verdict: $(VENV)/.ready ## judge a run, or that of MIX=, against deploy.toml
	@$(PY) -m loadtests.slo $(WHICH) $(call given,RUN,--run) $(call given,MIX,--mix)

capacity: $(VENV)/.ready ## the highest rate that holds every objective: bracket, bisect, confirm; into build/<model>/capacity.json
	@before="$(call written,capacity)"; \
	$(PY) -m loadtests.capacity $(WHICH) --url $(URL) --protocol $(PROTOCOL) $(ACCESS) --target $(T) --duration-s $(DURATION_S) \
	    --workers $(strip $(WORKERS)) --max-s $(BUDGET_S) $(call given,RATE,--start-rps); $(call then-draw,capacity)

compare-runs: $(VENV)/.ready ## whether NEW= is worse than BASE=: interleaved runs, confidence intervals, a table for a pull request
	@$(PY) -m loadtests.compare_runs $(WHICH) --base=$(call quoted,BASE) --new=$(call quoted,NEW) --repository $(REPOSITORY) \
	    --protocol $(PROTOCOL) --target $(T) --duration-s $(DURATION_S) --max-s $(BUDGET_S) $(call given,RATE,--rate)

tune: $(VENV)/.ready ## the best batch size, queue delay, instances and threads for the SLO here; takes BUDGET_S
	@before="$(call written,tuning)"; \
	$(PY) -m loadtests.tune $(WHICH) --target $(T) --max-s $(BUDGET_S) --protocol $(PROTOCOL); $(call then-draw,tuning)

report: $(VENV)/.ready ## draw a run as one HTML file, or that of MIX=; several of RUN="a b" over each other
	@$(PY) -m loadtests.report $(WHICH) $(addprefix --run ,$(RUN)) $(call given,MIX,--mix)

profile: $(VENV)/.ready ## trace REQUESTS= requests of USERS= users from the client to the operators: a timeline, a CPU profile
	@$(PY) -m loadtests.profile $(WHICH) --protocol $(PROTOCOL) --requests $(strip $(REQUESTS)) --users $(or $(strip $(USERS)),1) \
	    $(if $(filter command environment,$(firstword $(origin URL))),--url $(URL),--repository $(REPOSITORY))

##@ Kubernetes
simulate-scale: $(VENV)/.ready ## a day under the autoscaler, with what make capacity measured: its target and minReplicas
	@$(PY) -m loadtests.simulate_scale $(WHICH) \
	    $(if $(filter %.csv,$(TRAFFIC)),--traffic=$(call quoted,TRAFFIC),--shape=$(call quoted,TRAFFIC)) $(SCALE)

kubernetes: $(VENV)/.ready ## an overlay with limits computed for what is in the repository; then: kubectl apply -k build/kubernetes
	@$(PY) -m serving.kubernetes --repository $(REPOSITORY) --models $(MODELS) --triton-tag $(TRITON_TAG) \
	    --autoscaler $(strip $(AUTOSCALER)) $(call given,REGISTRY,--registry) $(call given,IMAGE_TAG,--image-tag) \
	    $(call given,MODELS_URL,--models-url)

##@ Plan
plan: $(VENV)/.ready ## memory, devices, parallelism, speed and, with RATE=, cost of MODEL=, PRESET=, ONNX= or LAYERS=
	@$(PY) -m deepseek.sizing $(or $(call given,PRESET,--preset),$(call given,ONNX,--onnx),$(if \
	    $(strip $(LAYERS)),--layers $(LAYERS) $(call given,HIDDEN,--hidden) $(call given,HEADS,--heads)),$(WHICH)) \
	    --precision $(PRECISION) $(call given,LENGTH,--length) $(call given,BATCH,--batch) \
	    $(call given,RATE,--rate) $(call given,P99_MS,--p99-ms) $(call given,DEVICES,--devices) $(if $(strip $(MEASURE)),--measure) $(PLAN)

##@ Development
setup: $(VENV)/.ready ## the virtual environment, pinned by requirements.lock

check-engine: $(VENV)/.ready-rtx ## every precision of every model (or of MODEL=) through TensorRT for RTX: no GPU needed
	@for model in $(CHECKED); do ($(subst $(B),$(BUILD)/$$model,$(ALONE)) \
	    $(MAKE) --no-print-directory -j2 -Otarget TARGET=tensorrt_rtx MODEL=$$model PRECISION=auto \
	    CHECKED_PRECISIONS="$(filter-out auto,$(PRECISION))" check-graphs) || exit; done
	@$(PY) -m export.check_engine --models $(MODELS) $(addprefix --model ,$(CHECKED)) \
	    $(addprefix --precision ,$(filter-out auto,$(PRECISION)))

test: $(VENV)/.ready-test $(VENV)/.ready-system $(VENV)/checkov/.ready lint ## everything: lint, types, all tests
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.ready-test ## ruff and mypy
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

measure-training: $(VENV)/.ready-test ## the guide's training advice, each piece measured here beside its claim
	@$(PY) -m tests.bench.training

measure-failure: $(VENV)/.ready-test $(VENV)/.ready-system ## overload, kills, cuts, a full disk, malformed requests, a soak of DURATION_S= (default: 1800); after make engine of both models
	@$(PY) -m tests.bench.failure $(if $(filter command environment,$(firstword $(origin DURATION_S))),--soak-s $(strip $(DURATION_S)))

bench: $(VENV)/.ready-test ## ratios against the raw runtime, bare tritonclient and perf_analyzer; after make engine of both models
	@$(PY) -m tests.bench

lock: $(VENV)/.ready-test ## pin anew what pyproject.toml allows
	@$(PY) -m pip install -q uv && $(PY) -m uv pip compile -q --upgrade --universal --python-version 3.11 --all-extras \
	    --no-emit-index-url --no-annotate --no-header pyproject.toml client/pyproject.toml -o $(BUILD)/all.lock
	@# torch and what it brings (its CUDA, its compiler) stay out: the build of torch is the machine's choice.
	@grep -vE '^(torch=|triton=|cuda-|nvidia-(cu|nccl|nvj|nvs|nvt))' $(BUILD)/all.lock >requirements.lock
	@echo checkov | $(PY) -m uv pip compile -q --upgrade --universal --python-version 3.11 \
	    --no-emit-index-url --no-annotate --no-header - -o tests/checkov.lock

# Of ENV_FILE stays what is its owner's, which stack.py keeps below its own last line.
no-env-file = if sed '0,/^\# Yours: /d' "$(ENV_FILE)" 2>/dev/null | grep -q .; then sed -i -n '/^\# Yours: /,$$p' "$(ENV_FILE)"; \
    elif grep -qs '^\# Yours: \|^\# Written by make engine' "$(ENV_FILE)"; then rm "$(ENV_FILE)"; fi
clean: ## remove what was built for MODEL, its repository entry, and ENV_FILE but your own lines
	rm -rf "$(B)" "$(REPOSITORY)/$(MODEL)"
	@$(no-env-file)

clean-cache: $(VENV)/.ready ## remove all artifacts from the cache
	@$(PY) -m export.cache --clear

distclean: ## remove all that was built, and the virtual environment
	rm -rf "$(BUILD)" "$(VENV)"
	@$(no-env-file)
	find "$(REPOSITORY)" -mindepth 1 ! -name README.md -delete

help:
	@echo "make TARGET [VARIABLE=value ...]; to see it all at work: make demo"
	@awk 'function say(text) {if (later) variables = variables text; else printf "%s", text} \
	    BEGIN {FS = ":.*## "} END {printf "%s", variables} \
	    /^##@/ {later = /^##@ Variables/; say(sprintf("\n%s\n", substr($$0, 5)))} \
	    /^[a-z_-]+:.*## / {say(sprintf("  make %-16s %s\n", $$1, $$2))} \
	    /^[A-Z0-9_]+ \?=.*##/ {split($$0, a, "##"); split(a[1], v, " \\?= ?"); gsub(/^ +/, "", a[2]); \
	        say(sprintf("  %-13s %-16s %s\n", v[1], (v[2] ~ /\$$\(/ ? "" : v[2]), a[2]))}' $(MAKEFILE_LIST)

# ---- environment -------------------------------------------------------------------------------
# The first Python that the embedded Triton has a stub for and that can make virtual environments.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
    $$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
# PyTorch's default build for Linux carries CUDA (about 3 GB); its own index has the CPU build.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TRITON_WHEEL := nvidia-pytriton==0.7.0
HARDWARE := $(if $(GPU),gpu,cpu)
# Set-up goes on where it was killed. Last of all pip replaces a package's RECORD by one that lists INSTALLER: one without
# it is not whole and must not pass for it.
whole = find $(1)/lib/ -maxdepth 3 -name '*.dist-info' ! -exec grep -qs '/INSTALLER,' {}/RECORD \; -prune -exec rm -r {} +
environment = { $(call whole,$(1)) || true; } 2>/dev/null; $(1)/bin/python -c 'import importlib.metadata as m; m.version("pip")' 2>/dev/null || $(2) -m venv $(1)
PIP := $(call whole,$(VENV)); $(PY) -m pip install -q --disable-pip-version-check -c requirements.lock
# Of Triton's wheel the files only: its numpy<2 is for a Python API not used here.
# One make at a time sets an environment up; who waited for another finds it done.
once = set -e; mkdir -p $(1); exec 8<$(1); flock 8; if find $@ $(addprefix -newer ,$^) 2>/dev/null | grep -q .; then exit 0; fi

$(VENV)/.ready: pyproject.toml client/pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 to 3.13 with venv on PATH; e.g.: apt-get install python3-venv (or PYTHON=…)" >&2; exit 2; }
	@$(call once,$(VENV)); \
	echo "setup     $(VENV) with $$($(PYTHON) --version), for a $(HARDWARE) machine"; \
	$(call environment,$(VENV),$(PYTHON)); \
	$(if $(GPU),,if $(PY) -c 'import urllib.request as u; u.urlopen("$(TORCH_CPU_INDEX)/torch/", timeout=5)' 2>/dev/null; then \
	    { $(PIP) --index-url $(TORCH_CPU_INDEX) 'torch>=2.9,<3'; } || true; fi;) \
	$(PIP) -e '.[train,export,$(HARDWARE),loadtest,gateway]' -e ./client; \
	$(PIP) --no-deps $(TRITON_WHEEL); \
	touch $@

$(VENV)/.ready-rtx $(VENV)/.ready-test $(VENV)/.ready-tensorrt: $(VENV)/.ready-%: $(VENV)/.ready
	@$(call once,$(VENV)); \
	$(PIP) -e '.[train,export,$(HARDWARE),loadtest,gateway,rtx,$*]'; \
	touch $@

# checkov, which judges the manifests, pins too many packages to live beside ours.
$(VENV)/checkov/.ready: tests/checkov.lock | $(VENV)/.ready
	@$(call once,$(@D)); \
	echo "setup     checkov, for tests"; \
	$(call environment,$(@D),$(PY)); \
	$(call whole,$(@D)); $(@D)/bin/python -m pip install -q --disable-pip-version-check --no-deps -r $<; \
	touch $@

# What tests need of the system: nginx with njs, Prometheus, kubectl; libfaketime for one of them. Installed where root may and no service manager would start
# them as services; elsewhere one line says what is missing, and those tests are skipped with their reason.
NJS := /usr/lib/nginx/modules/ngx_http_js_module.so
SYSTEM := gcc libc6-dev nginx-light libnginx-mod-http-js prometheus prometheus-alertmanager kubectl libfaketime
HAS_SYSTEM := test -e $(NJS) && type cc prometheus promtool amtool kubectl >/dev/null 2>&1
$(VENV)/.ready-system: | $(VENV)/.ready
	@if ! { $(HAS_SYSTEM); } && [ "$$(id -u)" = 0 ] && [ ! -d /run/systemd/system ] && command -v apt-get >/dev/null; then \
	    echo "setup     $(SYSTEM), for tests"; \
	    { apt-get update -qq; for package in $(SYSTEM); do \
	        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$package; done; } >/dev/null 2>&1; fi; \
	if $(HAS_SYSTEM); then touch $@; else \
	    echo "note: tests of the gateway, the alerts or the manifests will be skipped: apt-get install $(SYSTEM)"; fi

# ---- artifacts ---------------------------------------------------------------------------------
# One make at a time builds in a model's folder. The lock is on the folder itself and ends with whoever holds it.
ALONE = mkdir -p $(B) && exec 9<$(B) && { flock -n 9 || { echo "engine    waiting for another make in $(B)"; flock 9; }; } &&
built: $(if $(filter tensorrt_rtx,$(T)),$(B)/choice-$(T).json,$(REPOSITORY)/$(MODEL)/config.pbtxt $(ENV_FILE))
	@echo "engine    $< is up to date"

# What a build depends on beside files of this repository, each as a file that changes only when what it tells does.
# Another file of the same name is known by its time and size.
IN_FOLDER := cd '$(abspath $(FOLDER))' && pwd -P
settings-data = echo "$$DATA"; stat -Lc '%.Y %s' "$$DATA"
settings-deploy = $(IN_FOLDER) && stat -Lc '%.Y %s' deploy.toml
settings-folder = $(IN_FOLDER) && find -L . -mindepth 1 \( -name '.*' -o -name __pycache__ \) -prune -o \
    -type f ! -path ./deploy.toml ! -path './$(TUNED)' -printf '%P %T@ %s\n' | LC_ALL=C sort
unreadable-folder = echo "error: MODELS: seen '$(MODELS)'; no $(FOLDER) can be read, whose changes are to be followed" >&2; exit 2
# Tuned values change how a model is served, not what is built; they may come, change and go.
settings-tuned = cat '$(FOLDER)/$(TUNED)'
settings-prune = echo '$(PRUNE)'
settings-high-precision = echo '$(HIGH)'
settings-target = echo '$(T)'
settings-precision = echo '$(PRECISION) $(CANDIDATES)'
settings-tensorrt = echo '$(if $(INSIDE),$(TRITON_TAG),$(if $(NATIVE),native,$(TRITON_TAG)))'
$(B)/settings/%: FORCE
	@mkdir -p $(@D); ($(settings-$*)) >$@.part 2>/dev/null || { $(or $(unreadable-$*),true); }; \
	if cmp -s $@.part $@; then rm $@.part; else mv $@.part $@; fi

STAGES := export/artifact.py $(wildcard deepseek/spec/*.py)

# Which precisions auto compares: deploy.toml's candidates; and the file that its tuned values are in.
ifneq ($(filter built $(REPOSITORY)/% $(BUILD)/%,$(MAKECMDGOALS)),)
include $(B)/spec.mk
endif
$(B)/spec.mk: $(B)/settings/deploy $(wildcard deepseek/spec/*.py) | $(VENV)/.ready
	@mkdir -p $(@D) && $(PY) -m deepseek.spec --make $(WHICH) >$@.part && mv $@.part $@
PRECISIONS = $(sort fp32 $(if $(filter auto,$(PRECISION)),$(CANDIDATES),$(PRECISION)))

$(B)/weights: $(B)/settings/folder $(addprefix deepseek/,config.py transformer.py training/recipe.py) $(B)/settings/data | $(VENV)/.ready
	@OMP_WAIT_POLICY=passive $(PY) -m export.train $(WHICH)  # idle threads do not spin: a busy machine is no slower
	@touch $@

# The module that is exported: pruned where PRUNE says so. Without it, what an earlier PRUNE left goes.
PRUNING := $(addprefix deepseek/,attention.py distillation.py prunable.py pruning.py) export/prune.py
$(B)/module: $(B)/weights $(B)/settings/deploy $(if $(PRUNE),$(PRUNING)) $(B)/settings/prune
	@$(if $(PRUNE),OMP_WAIT_POLICY=passive $(PY) -m export.prune $(WHICH) --ratio $(PRUNE),rm -f $(B)/pruned.safetensors $(B)/pruning.json)
	@touch $@

$(B)/fp32/model.onnx: $(B)/module $(addprefix export/,to_onnx.py source.py reference.py) $(STAGES)
	@$(PY) -m export.to_onnx $(WHICH)

QUANTIZE := $(B)/fp32/model.onnx $(addprefix export/,quantize.py ptq.py qdq.py calibration.py) deepseek/quantization.py
# One candidate of several that cannot be made leaves word, and the others go on.
CANDIDATE := $(if $(filter auto,$(PRECISION)),--candidate)
$(B)/fp16/model.onnx: $(QUANTIZE)
	@$(PY) -m export.quantize $(WHICH) --precision fp16 $(CANDIDATE)
$(B)/int8/model.onnx $(B)/fp8/model.onnx: $(B)/%/model.onnx: $(QUANTIZE) \
    $(addprefix export/,eight_bits.py sensitivity.py curve.py budget.py accuracy.py) $(B)/settings/high-precision
	@$(PY) -m export.quantize $(WHICH) --precision $* --high-precision $(HIGH) $(CANDIDATE)

$(B)/%/torchscript/model.pt: $(B)/fp32/model.onnx $(addprefix export/,to_torchscript.py reference.py)
	@$(PY) -m export.to_torchscript $(WHICH) --precision $*

# What a tensorrt build lacks is said before anything is trained or exported for it.
ifeq ($(T)$(INSIDE)$(NATIVE),tensorrt)
$(B)/weights: | can-build
endif
can-build: $(VENV)/.ready
	@$(PY) -m export.container --tag $(TRITON_TAG) --check

$(B)/%/$(T)/model.plan: $(B)/%/model.onnx export/to_tensorrt.py export/engine.py $(if $(filter tensorrt,$(T)),$(B)/settings/tensorrt) $(if $(filter tensorrt_rtx,$(T)),| $(VENV)/.ready-rtx) $(if $(NATIVE),| $(VENV)/.ready-tensorrt)
	@$(ON_TARGET) export.to_tensorrt $(WHICH) --precision $* --target $(T)

.SECONDEXPANSION:
$(B)/choice-$(T).json: $$(foreach p,$$(PRECISIONS),$(B)/$$p/$(ENGINE_NAME)) $(B)/settings/precision $(addprefix export/,compare.py budget.py runners.py accuracy.py)
	@$(ON_TARGET) export.compare $(WHICH) --target $(T) --precision $(PRECISION)

# What docker compose reads: written anew where a model is published, the first line says that it was for other settings, or
# somebody has put a certificate there.
STACK := $(strip $(MODEL) $(REPOSITORY) $(MODELS) $(BUILD) $(GATEWAY_PORT) $(TRITON_TAG) $(PROJECT) $(GATEWAY_HOSTS))
WRITE_STACK = $(PY) -m serving.stack --model $(MODEL) --repository $(REPOSITORY) --models $(MODELS) --env-file $(ENV_FILE) --gateway-port $(GATEWAY_PORT) \
    --triton-tag $(TRITON_TAG) --project=$(call quoted,PROJECT) $(addprefix --host ,$(GATEWAY_HOSTS)) --settings '$(STACK)'
$(ENV_FILE): $(REPOSITORY)/$(MODEL)/config.pbtxt $(addprefix serving/,stack.py served.py keys.py certificate.py flags.py) \
    $(addprefix serving/,alerts.py recording_rules.py dashboard.py) $(wildcard docker/observe/*/*.* docker/observe/*/*/*.*) \
    $(shell [ "$$(head -n 1 $(ENV_FILE) 2>/dev/null)" = '# $(STACK)' ] \
        && [ -z "$$(find $(BUILD)/gateway/tls.crt -cnewer $(ENV_FILE) 2>/dev/null)" ] || echo FORCE)
	@$(WRITE_STACK)

# check-engine: the graphs that a TensorRT target takes, and which models have them checked.
CHECKED = $(or $(NAMED),$(sort $(notdir $(patsubst %/deploy.toml,%,$(wildcard $(MODELS)/*/deploy.toml)))))
check-graphs: $(foreach p,$(or $(CHECKED_PRECISIONS),fp32 fp16 int8 fp8),$(B)/$(p)/model.onnx)

# Interrupted, make takes away what a recipe has changed; a server may be reading this one.
.PRECIOUS: $(REPOSITORY)/$(MODEL)/config.pbtxt
$(REPOSITORY)/$(MODEL)/config.pbtxt: $(B)/choice-$(T).json $(B)/settings/target $(B)/settings/tuned export/to_triton.py \
    serving/onnxruntime_backend.py serving/turns.py deepseek/onnxruntime_session.py
	@$(PY) -m export.to_triton $(WHICH) --target $(T) --repository $(REPOSITORY) $(if $(strip $(ANYWAY)),--anyway)
