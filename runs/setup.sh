# Sourced by the scripts beside it: makes .venv with this project in it, or reuses it, and activates it.
# usage: source runs/setup.sh [EXTRAS]      EXTRAS: extras of pyproject.toml, such as [dev]
# Needs Python 3.10 or newer (PYTHON=... names another than python3); pip installs as the user configured it.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="${1:-}"
stamp=".venv/installed${extras}-$(cksum < pyproject.toml | cut -d ' ' -f 1)"
if [ ! -e "$stamp" ]; then
    echo "setting up .venv (once)"
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extras}"
    touch "$stamp"
fi
source .venv/bin/activate
