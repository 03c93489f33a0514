# Every target sets itself up: a virtual environment in .venv, torch, Triton (on Linux), the package.
#
# torch: where an NVIDIA GPU is present and $(PYTHON) has a CUDA torch, that torch and its Triton are used and nothing
# is installed over them; elsewhere pip installs $(TORCH_SPEC). On Linux the default package index answers that with a
# CUDA build of several gigabytes. For the small one, point pip at PyTorch's index of CPU wheels:
#     make test TORCH_SPEC='torch==2.13.0+cpu' PIP_ARGS='--extra-index-url <that index>'

PYTHON ?= python3
VENV ?= .venv
TORCH_SPEC ?= torch==2.13.0
TRITON_SPEC ?= triton==3.6.0
BUILD_REQUIRES ?= 'setuptools>=77'
PIP_ARGS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
OUT ?=
PART ?= 1/1
EXAMPLE_ARGS ?=

PY := $(VENV)/bin/python
PIP := env -u PYTHONPATH $(PY) -m pip --disable-pip-version-check
NATIVE_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
CONSTRAINTS := $(VENV)/constraints.txt

# Lets the source tree run where pip could not install it (see setup-environment).
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: help demo examples test bench report docs gpu-report lint format clean setup setup-pip setup-environment constraints
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z%-]*\):.*  ## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

demo: setup  ## train on MNIST digits with plain PyTorch and with tiedfused; a table and demo.png (DEMO_ARGS)
	$(PY) examples/demo.py $(DEMO_ARGS)

EXAMPLES := transpose_or_inverse tied_vs_untied sparse_autoencoder deep_stack denoising

examples: $(EXAMPLES:%=example-%)  ## every example that docs/index.md lists, ten minutes; EXAMPLE_ARGS=--docs for docs/

example-%: setup  ## one of them: a table and a picture, under three minutes (EXAMPLE_ARGS)
	$(PY) examples/$*.py $(EXAMPLE_ARGS)

# Twice, because Triton decides when it is imported whether it compiles or interprets its kernels. Each time in a process
# a core, where pytest-xdist is installed; eight at most, of 1 to 2 GB each. Where there is a GPU in one process: each
# would hold some of its memory, of which tests of offsets past 2³¹ need 36 GiB. Where it has more: PYTEST_ARGS='-n 4'.
PROCESSES := -n logical --maxprocesses 8 --dist worksteal

test: setup  ## all tests and doctests; the gpu ones too where there is a GPU (PYTEST_ARGS)
	@status=0; \
	processes=$$($(PY) -c 'import torch, xdist; print("" if torch.cuda.is_available() else "$(PROCESSES)")' 2>/dev/null); \
	$(PY) -m pytest --ignore=tests/interpreter $$processes $(PYTEST_ARGS) || status=1; \
	if $(PY) -c 'import triton' 2>/dev/null; then \
	  TRITON_INTERPRET=1 $(PY) -m pytest tests/interpreter $$processes $(PYTEST_ARGS) || status=1; \
	else echo 'tests/interpreter not run: no Triton here'; fi; \
	exit $$status

bench: setup  ## the layer beside its peers, one table in about two minutes (BENCH_ARGS)
	$(PY) -m tiedfused.cli bench --quick $(BENCH_ARGS)

report: setup  ## measure this machine in full into bench/results, and show it in docs/benchmarks.md and README.md
	$(PY) -m tiedfused.cli bench --out bench/results $(BENCH_ARGS)
	$(PY) bench/document.py

docs: setup  ## put on the pages what was measured: docs/data of the examples, bench/results of the benchmark
	$(PY) docs/generate.py
	$(PY) bench/document.py

# Without the set-up: machines with a GPU often have no package index, and torch, Triton and pytest are enough.
gpu-report:  ## all of it on an NVIDIA GPU in under nine minutes: make gpu-report OUT=folder [PART=1/3]
	@test -n "$(OUT)" || { echo 'OUT: got nothing; expected a folder: make gpu-report OUT=folder [PART=1/3]'; exit 2; }
	$(PYTHON) -m tiedfused.benchmark.gpu_report --out '$(OUT)' --part '$(PART)' $(BENCH_ARGS)

lint: $(DEV_STAMP)  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(DEV_STAMP)  ## rewrite the sources as ruff would have them
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:  ## remove the virtual environment, builds and caches
	rm -rf tiedfused/_C*.so tiedfused/_native_build.txt
	rm -rf $(VENV) build dist *.egg-info tiedfused-bench tiedfused-profile demo.png $(EXAMPLES:%=%.png)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- set-up -------------------------------------------------------------------------------------------------------

setup: $(STAMP)

HAS_GPU_TORCH = $(shell nvidia-smi >/dev/null 2>&1 && $(PYTHON) -c 'import torch; assert torch.version.cuda' \
	2>/dev/null && echo yes)

$(STAMP): pyproject.toml setup.py $(NATIVE_SOURCES)
	@$(MAKE) --no-print-directory $(if $(HAS_GPU_TORCH),setup-environment,setup-pip)
	@touch $@

$(DEV_STAMP): $(STAMP)
	$(PIP) install $(PIP_ARGS) -c $(CONSTRAINTS) --no-build-isolation -e '.[dev]'
	@touch $@

# Without build isolation, so that setup.py finds torch to build the native ops against; what it builds, and why not
# more, is in `tiedfused info`. A new environment has an old setuptools, or none.
setup-pip:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(PIP_ARGS) '$(TORCH_SPEC)'
	@# A CUDA build of torch brings the Triton it was built with; a CPU build brings none.
	[ "$$(uname)" != Linux ] || $(PY) -c 'import triton' 2>/dev/null || $(PIP) install $(PIP_ARGS) '$(TRITON_SPEC)'
	@$(MAKE) --no-print-directory constraints
	$(PIP) install $(PIP_ARGS) $(BUILD_REQUIRES)
	$(PIP) install $(PIP_ARGS) -c $(CONSTRAINTS) --no-build-isolation -e '.[test,demo]'

# Without a pip of its own the new environment uses $(PYTHON)'s pip and setuptools, which match its packages. The .pth
# line serves a $(PYTHON) that is itself a virtual environment, which --system-site-packages looks past.
# GPU machines are often cut off from any package index. Then what pytest finds in the environment has to do, and if
# not even a build is possible there, the PYTHONPATH above lets everything run from the source tree.
setup-environment:
	$(PYTHON) -m venv --system-site-packages --without-pip $(VENV)
	@$(PYTHON) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' \
	  > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/environment-torch.pth"
	@$(MAKE) --no-print-directory constraints
	$(PIP) install $(PIP_ARGS) --retries 1 -c $(CONSTRAINTS) --no-build-isolation -e '.[test,demo]' || \
	  $(PIP) install --no-build-isolation --no-deps -e . || \
	  $(PIP) install $(PIP_ARGS) --retries 1 -c $(CONSTRAINTS) -e '.[test,demo]' || \
	  echo 'pip cannot install here: running from the source tree, with the packages of $(PYTHON)'

# Whatever pip installs later, torch and Triton stay what they are.
constraints:
	@$(PY) -c 'from importlib.metadata import distributions as ds; \
	print(*sorted({f"{d.name}=={d.version}" for d in ds() if d.name in ("torch", "triton")}), sep="\n")' > $(CONSTRAINTS)
