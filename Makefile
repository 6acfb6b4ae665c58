# Thin: everything runs through uv, and each line works directly too (`uv run dvc repro`).
UV := $(or $(shell command -v uv),.tools/bin/uv)

.PHONY: help setup demo smoke test test-cluster asan lint ui gpu wheel constraints

help:
	@echo "make demo   set up, run the whole pipeline on real images, show the results"
	@echo "make smoke  all stages on a few small images in minutes, in a copy of the committed files (.smoke)"
	@echo "make test   set up, run the tests"
	@echo "make test-cluster  what takes minutes more: loss of a node, two hosts (root, openssh-server, iproute2, rsync)"
	@echo "make asan   the operator's tests under AddressSanitizer"
	@echo "make gpu    prove and measure everything on this machine's GPU in 8 minutes; results in gpu-out (needs no set-up)"
	@echo "make wheel  a wheel in dist with the operator compiled, for machines without a compiler"
	@echo "make constraints  the exact packages anew, in pyproject.toml and, with hashes, in constraints.txt"
	@echo "make lint   ruff and mypy"
	@echo "make ui     MLflow on http://127.0.0.1:5000"

# The compiled mmcv is kept for the next checkout, by torch, Python and kind of device.
TORCH := $(shell sed -n '/.*"\(torch==[0-9.]*\)".*/ {s//\1/p;q}' pyproject.toml)
GPU := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | paste -sd -)
WHEELS := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/elsa/wheels/$(TORCH)-$(shell cat .python-version)-$(or $(GPU),cpu)
# A compiler process takes up to 2 GB.
export MAX_JOBS ?= $(shell awk -v n=$$(nproc) '/MemAvailable/ {m = int($$2 / 2e6); print m < 1 ? 1 : m < n ? m : n}' /proc/meminfo)

setup: uv.lock | $(UV)
	@UV_FIND_LINKS="$(WHEELS)" $(UV) sync --compile-bytecode || { echo "error: setup failed. It needs a C++ compiler (Debian: apt-get install g++), Python 3.12 with its headers, and 7 GB of disk" >&2; exit 1; }
	@.venv/bin/python pipelines/cluster/keep_wheel.py onedl-mmcv "$(WHEELS)"

# It holds nothing that pyproject.toml does not decide, and would hide a wheel that came since.
uv.lock: pyproject.toml .python-version $(WHEELS)
	@rm -f $@

$(WHEELS):
	@mkdir -p "$@"

demo: setup
	$(UV) run dvc repro report
	@$(UV) run elsa results

# Beside the checkout's own results, but with its cache, for the operator alone: if it is built, it is not built
# again. With the committed lock DVC would look for the outputs that it names, of another checkout, and nowhere else.
smoke: setup
	@rm -rf .smoke && git clone --quiet . .smoke
	@cd .smoke && export PATH="$(CURDIR)/.venv/bin:$$PATH" && dvc config --local cache.dir "$(CURDIR)/.dvc/cache" \
	  && rm -f dvc.lock && python -m pipelines compose recipe=smoke && dvc repro build_op \
	  && dvc repro --no-run-cache report && python -m pipelines results
	@echo "All of it is in .smoke: .smoke/reports/index.html"

# Two at a time, with a thread each: while one waits for Ray, the other computes.
test: setup
	OMP_NUM_THREADS=1 $(UV) run pytest -n 2 --dist loadfile --no-loadscope-reorder

test-cluster: setup
	ELSA_TEST_CLUSTER=1 $(UV) run pytest tests/cluster tests/integration/test_cluster.py tests/integration/test_sweep.py

# Leaks are Python's own. Exceptions need libstdc++ loaded as early as the sanitizer. The tests of
# values and inputs are those that run the kernels.
asan: setup
	$(UV) run python -m ops.build --sanitize --out build/asan
	cxx="$${CXX:-c++}"; $(UV) run env \
	  LD_PRELOAD="$$($$cxx -print-file-name=libasan.so) $$($$cxx -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 ELSA_OPS_LIBRARY=build/asan \
	  pytest tests/ops/test_values.py tests/ops/test_inputs.py

# For CPUs. It fits every torch since 2.10, and every Python that the project takes.
wheel: setup
	CUDA_VISIBLE_DEVICES= $(UV) run python -m ops.build --quiet --out build/wheel-op
	ELSA_PREBUILT=build/wheel-op $(UV) build --wheel --out-dir dist

# What `make setup` installs: the versions for uv in pyproject.toml, and with hashes for other installers. Locked
# anew, without the wheels that were kept here: those have no published hash.
constraints: | $(UV)
	@rm -rf build/lock && mkdir -p build/lock && cp .python-version build/lock
	@sed '/^constraint-dependencies = \[/,/^\]/d' pyproject.toml > build/lock/pyproject.toml
	@$(UV) lock --quiet --project build/lock
	@$(UV) export --quiet --project build/lock --frozen --no-emit-project --no-annotate --no-header --format requirements.txt \
	  --output-file build/lock/exported.txt
	@{ echo "# Exact versions and hashes of what \`make setup\` installs; written by \`make constraints\`."; \
	  sed "s/ ; python_full_version == [^\\]*/ /" build/lock/exported.txt; } > build/lock/constraints.txt
	@{ echo "constraint-dependencies = ["; sed -n 's/^\([^ #]*==[^ ]*\).*/"\1",/p' build/lock/constraints.txt | fmt -w 128 | sed 's/^/    /'; \
	  echo "]"; } > build/lock/pins && sed -i '/^exclude-newer = /r build/lock/pins' build/lock/pyproject.toml
	@mv build/lock/constraints.txt build/lock/pyproject.toml . && rm -r build/lock

lint: setup
	$(UV) run ruff check
	$(UV) run ruff format --check
	$(UV) run mypy

# Without set-up: a machine with a GPU may have torch and no network.
gpu:
	$(or $(wildcard .venv/bin/python),python3) -m pipelines.benchmarks.gpu --out "$${OUT:-gpu-out}"

ui: setup
	@$(UV) run elsa compare --url
	MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(UV) run mlflow ui --workers 2 --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000

.tools/bin/uv:
	@{ python3 -m venv .tools && .tools/bin/python -m pip install --quiet "uv>=0.13,<0.14"; } >/dev/null 2>&1 \
	  || { rm -rf .tools; python3 -m pip install --quiet --target .tools "uv>=0.13,<0.14"; } \
	  || { rm -rf .tools; echo "error: can't fetch uv with python3's venv or pip. Install uv, or python3-venv, and try again" >&2; exit 1; }
