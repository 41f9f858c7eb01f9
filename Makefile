# Every target makes what it needs, so that `make demo` and `make test` are all that a fresh clone must be told.
# PYTHON picks the interpreter; NO_VENV=1 uses it as it is (a GPU machine that already has torch).
PYTHON ?= python3
ifdef NO_VENV
RUN := $(PYTHON)
DEMO_ENV :=
DEV_ENV :=
else
RUN := .venv/bin/python
DEMO_ENV := .venv/.demo-installed
DEV_ENV := .venv/.dev-installed
endif
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: demo test lint bench gpu-check gpu-check-more gpu-loader gpu-train clean

demo: $(DEMO_ENV) ## photographs -> shards -> a pretrained tiny MAE -> pictures, in demo/
	$(RUN) -m patchmill.tools.demo --out demo

test: $(DEV_ENV) ## two processes: Triton's interpreter is switched on when a kernel is decorated
	$(RUN) -m pytest -q
	TRITON_INTERPRET=1 $(RUN) -m pytest -q -m interpreter

lint: $(DEV_ENV)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy patchmill tests

bench: $(DEV_ENV) ## the CPU benchmarks; results go to benchmarks/results/
	$(RUN) -m benchmarks.run_all

gpu-check: $(DEV_ENV) ## GPU tests, steps, kernels, ceilings, under 9 minutes; results in $$OUT or benchmarks/results/
	$(RUN) -m benchmarks.gpu_check $(GPU_CHECK)

gpu-check-more: $(DEV_ENV) ## loss curves, other models and batches, under 9 minutes
	$(RUN) -m benchmarks.gpu_check --more $(GPU_CHECK)

gpu-loader: $(DEV_ENV) ## DALI on the GPU, from JPEG tars to the step, under 6 minutes; IMAGES=folder or .zip of JPEGs
	timeout --kill-after=10 500 $(RUN) -m benchmarks.bench_dali_gpu

gpu-train: $(DEV_ENV) ## MAE and U-MAE on CIFAR-10, under 8 minutes; DATA=folder or .zip with train/ and test/
	timeout --kill-after=10 520 $(RUN) -m benchmarks.train_cifar $(DATA)

clean:
	rm -rf .venv demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo-installed: pyproject.toml constraints.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

.venv/.dev-installed: pyproject.toml constraints.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,dali]'
	touch $@ .venv/.demo-installed
