#!/usr/bin/env bash
# The whole test suite on a fresh machine: set-up, ruff, then pytest, two tests at a time.
# usage: bash runs/test.sh [--latest] [PYTEST ARGUMENTS]      for example -m slow
# --latest tests with the newest versions of all packages that pyproject.toml admits, in an
# environment of its own, .venv-latest, instead of those in runs/constraints.txt.
set -euo pipefail
versions=""
for argument in "$@"; do
    shift
    if [ "$argument" = --latest ]; then
        versions=latest
    else
        set -- "$@" "$argument"
    fi
done
source "$(dirname "$0")/setup.sh" "[dev]" "$versions"
# another ruff than the tested one may format differently
if [ -z "$versions" ]; then
    ruff check --quiet .
    ruff format --quiet --check .
fi
python -m pytest -n 2 --dist worksteal "$@"
