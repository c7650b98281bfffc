# Sourced by the scripts beside it: creates an environment with this project, or reuses it, and
# activates it.
# usage: source runs/setup.sh [EXTRAS [latest]]
# EXTRAS: extras of pyproject.toml, such as [dev].
# By default .venv gets the versions in runs/constraints.txt, the ones that were tested. With
# latest, .venv-latest gets the newest versions that pyproject.toml admits, upgraded every time.
# Needs Python 3.10 or newer (PYTHON=... names another than python3); pip installs as the user
# configured it.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="${1:-}"
venv=.venv
# no stamp: which versions are the newest is known to the package index only
stamp=""
options="--upgrade --upgrade-strategy eager"
if [ "${2:-}" = latest ]; then
    venv=.venv-latest
else
    wanted="$(cat pyproject.toml runs/constraints.txt | cksum | cut -d ' ' -f 1)"
    stamp="$venv/installed${extras}-$wanted"
    options="--constraint runs/constraints.txt"
fi
if [ ! -e "$stamp" ]; then
    echo "setting up $venv"
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    # $options holds several words
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check $options \
        --editable ".${extras}" || {
        echo "setup.sh: pip could not install the packages into $venv; its message is above." \
            "Check the package index, or install versions that it has: pip install ." >&2
        return 1
    }
    [ -z "$stamp" ] || touch "$stamp"
fi
source "$venv/bin/activate"
