#!/usr/bin/env bash
# The whole test suite on a fresh machine: set-up, then pytest, two tests at a time. Arguments go to pytest, for example -m slow.
set -euo pipefail
source "$(dirname "$0")/setup.sh" "[dev]"
python -m pytest -n 2 --dist worksteal "$@"
