# make demo   train on handwritten digits on the CPU and draw each by name: grid.png, guidance.png, strip.png, loss.png in demo
# make test   set up an environment and run the tests, two at a time (WORKERS=8: eight), in about 20 minutes on 2 cores
# make check  lint, types, structure and the quick tests: before every commit, under 4 minutes on 2 cores
# make lint   ruff, ruff format, clang-format and mypy, each at its pinned version
# make docs   the documentation as a site, strict: build/site
# make test-torch TORCH=2.11.0  the native, compile and interpreter tests on another release: .venv-torch-2.11.0
# make bench  measure this machine against upstream, in at most 21 minutes: bench/report.md, results.json, pictures
# make bench-compiled  compile upstream for every benchmark ahead, once, in about ten minutes: make bench then meets it
# make cuda-model  what a step launches on a CUDA device, and the time of its parts on an H100 and an A100; no GPU
# make release-tests  what make test leaves out, the tests marked release: a real wheel, built and measured, a sample under
#             sanitizers, dry runs of the whole report and of triage, the demo's quality, every kernel on sm_80 and sm_100,
#             ranks that torchrun starts, and all combinations of which make test runs some, in Triton's interpreter, too
# make sanitize  the tests of native code under AddressSanitizer and UndefinedBehaviorSanitizer: build/sanitize
# make wheels packages that a GPU machine without network lacks, for benchmarks/gpu_report.sh: .whl/
# make clean  remove what these have made, the pictures excepted

PYTHON ?= python3
VENV ?= .venv
# The one place that pins torch. Any build of it will do, for the CPU or for CUDA.
TORCH ?= torch==2.14.1 torchvision==0.29.1
# Upstream's last release with GroupNorm blocks, installed next to the current one for the equivalence tests.
UPSTREAM_1X ?= denoising-diffusion-pytorch==1.11.1
# The origin of several samplers, without what the rest of it needs: the tests load one file.
K_DIFFUSION ?= k-diffusion==0.1.1.post1
# The networks that most research trains: OpenAI's and EDM's, without what the rest of these packages needs.
OPENAI_UNET ?= torchcfm==1.0.7
EDM_UNETS ?= nvidia-physicsnemo==2.2.2

# Processes that share the tests; each takes one processor and up to a gigabyte.
WORKERS ?= 2
# What the benchmarks need and a machine made for torch may not have. All are pure Python. The report takes those that are
# not installed there: pytest-benchmark times, and pytest-xdist runs the tests on all cores.
WHEELS ?= "denoising-diffusion-pytorch>=2.3.4,<2.4" ema-pytorch pytorch-fid einops diffusers importlib-metadata zipp \
	"tyro>=0.9" docstring-parser typeguard pytest-benchmark py-cpuinfo pytest-xdist execnet

BIN := $(VENV)/bin
SOURCES := $(shell find csrc ddpm_fast -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh') setup.py pyproject.toml

NATIVE_SOURCES = $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')

# For maps of 8 x 8 pixels a second thread helps little, and on a busy machine the two mostly wait for each other.
ONE_THREAD := OMP_NUM_THREADS=1

# The benchmarks' threads, the same for both sides.
BENCH_THREADS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 2 ? n : 2)))

# Triton decides at its import whether it interprets, so that `make test` runs pytest twice: kernels, then the rest.
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

# The quick tests: layers and importing, missing packages, documentation, noise, tables and samplers, arguments, dispatch,
# recordings and tapes, the network's algebra, the sampler step, images. The rest of them is `make test`'s.
QUICK := $(addprefix tests/,test_structure.py test_noise.py runtime/test_extras.py runtime/test_dispatch.py \
	runtime/test_recording.py runtime/test_tape.py docs diffusion/test_schedules.py diffusion/test_samplers_gaussian.py \
	diffusion/test_input_errors.py models/test_algebra.py ops/sampler_step/test_op.py training/test_data.py)

# The packages of an extra that needs nothing of ddpm_fast, as pyproject.toml pins them.
EXTRA = $$($(BIN)/python -c 'from setuptools.config.pyprojecttoml import read_configuration as read; \
	print(*read("pyproject.toml", expand=False)["project"]["optional-dependencies"]["$(1)"])')

.PHONY: demo test check lint docs test-torch bench bench-compiled cuda-model release-tests sanitize wheels clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo-ready
	rm -rf demo/run
	$(ONE_THREAD) $(BIN)/ddpm-fast train digits --labels digits --seed 0 --results-folder demo/run
	$(ONE_THREAD) $(BIN)/ddpm-fast sample demo/run --seed 0 --steps 12 --class 0 1 2 3 4 5 6 7 8 9 --columns-per-class 10 \
		--guidance-strip 0 1 2 4 8 --scale 4 --out demo/grid.png
	mv demo/grid-strip.png demo/strip.png
	mv demo/grid-guidance.png demo/guidance.png
	cp demo/run/loss.png demo/loss.png
	@echo "A row for each digit is in $(CURDIR)/demo/grid.png, what guidance does in guidance.png, the way out of the" \
		"noise in strip.png, the loss in loss.png."

test: $(VENV)/.test-ready
	@failed=0; TRITON_INTERPRET=1 $(PYTEST) tests/ops || failed=1; $(PYTEST) && exit $$failed

check: lint $(VENV)/.test-ready
	$(ONE_THREAD) $(PYTEST) -m "not slow and not gpu" $(QUICK)

lint: $(VENV)/.lint-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE_SOURCES)
	$(BIN)/mypy

docs: $(VENV)/.docs-ready
	$(BIN)/mkdocs build --strict

# A number, torch==2.11.0 or newest; without TORCH the pinned release. It needs nothing of $(VENV).
test-torch:
	$(PYTHON) tests/build/torch_release.py $(firstword $(TORCH)) --workers $(WORKERS)

bench: $(VENV)/.test-ready
	OMP_NUM_THREADS=$(BENCH_THREADS) PYTHON=$(abspath $(BIN))/python \
		bash benchmarks/gpu_report.sh bench --device cpu --minutes 20 --cache build/compiled

bench-compiled: $(VENV)/.test-ready
	OMP_NUM_THREADS=$(BENCH_THREADS) TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/compiled \
		$(BIN)/python benchmarks/warm.py cpu cpu

cuda-model: $(VENV)/.test-ready
	@$(ONE_THREAD) $(BIN)/python benchmarks/roofline.py

# The builds, whose times are measured, run alone.
release-tests: export DDPM_FAST_RELEASE = 1
release-tests: $(VENV)/.test-ready
	@failed=0; $(BIN)/python -m pytest -m release tests/build || failed=1; \
		TRITON_INTERPRET=1 $(PYTEST) -m release tests/ops || failed=1; \
		$(PYTEST) -m release --ignore tests/build && exit $$failed

sanitize: $(VENV)/.test-ready
	$(ONE_THREAD) $(BIN)/python tests/build/sanitize.py

wheels: $(VENV)/.build-ready
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --dest .whl $(WHEELS)

clean:
	rm -rf .venv .venv-torch-* .whl bench build dist *.egg-info demo/run ddpm_fast/_C*.so ddpm_fast/_build_info.json

$(VENV)/.build-ready:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "setuptools>=77" wheel ninja pybind11 $(TORCH)
	touch $@

# The one build of the extension.
$(VENV)/.package-ready: $(VENV)/.build-ready $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	touch $@

# The package is there already, so that pip installs what these parts need and builds nothing.
$(VENV)/.demo-ready: $(VENV)/.package-ready
	$(BIN)/python -m pip install --quiet "ddpm_fast[demo]"
	touch $@

$(VENV)/.test-ready: $(VENV)/.package-ready
	$(BIN)/python -m pip install --quiet "ddpm_fast[test]"
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/upstream-1x $(UPSTREAM_1X)
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/reference-packages $(K_DIFFUSION) $(EDM_UNETS)
	$(BIN)/python -m pip install --quiet --no-deps $(OPENAI_UNET)
	touch $@

# mypy reads the types of what the tests install.
$(VENV)/.lint-ready: $(VENV)/.test-ready
	$(BIN)/python -m pip install --quiet $(call EXTRA,lint)
	touch $@

$(VENV)/.docs-ready: $(VENV)/.build-ready pyproject.toml
	$(BIN)/python -m pip install --quiet $(call EXTRA,docs)
	touch $@
