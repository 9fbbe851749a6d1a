# Short names for what CONTRIBUTING.md describes. They use the Python of the active environment.
.PHONY: build test lint debug ci

build:  # compile what changed, into this folder; build/compile_commands.json is for editors
	pip install --no-build-isolation --no-deps -e .

test:
	pytest

lint:
	ruff check .
	ruff format --check .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs clang-format --dry-run --Werror
	mypy

debug:  # with sanitizers, into build/debug
	cmake --preset debug -DPython_EXECUTABLE="$$(command -v python)"
	cmake --build --preset debug

ci:
	.ci/run
