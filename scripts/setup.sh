# Sourced by the other scripts: makes sure a Python with tamis and one of its extras is there.
#
#   tamis_setup EXTRA    afterwards $PYTHON runs an environment with `tamis[EXTRA]`, editable from this checkout
#
# Environment: TAMIS_VENV names a virtual environment to use (made when missing); otherwise the active one is used if it
# holds tamis and torch, otherwise .venv in the checkout.  TAMIS_PYTHON names the interpreter a new one is made from.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

say() { printf '== %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${TAMIS_PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if new_enough "$candidate"; then command -v "$candidate"; return; fi
    done
    die "Python 3.11 or newer is needed; found $(python3 -V 2>&1 || true). Install one, or name it in TAMIS_PYTHON."
}

choose_venv() {
    if [ -n "${TAMIS_VENV:-}" ]; then
        printf '%s\n' "$TAMIS_VENV"
    elif [ -n "${VIRTUAL_ENV:-}" ] && "$VIRTUAL_ENV/bin/python" -c \
        'from importlib.metadata import version as v; v("torch"); v("tamis")' 2>/dev/null; then
        printf '%s\n' "$VIRTUAL_ENV"
    else
        printf '%s\n' "$ROOT/.venv"
    fi
}

# What an installation depends on: a change of any of these makes pip run again.
fingerprint() {
    { printf '%s\n' "$ROOT"; "$PYTHON" -VV; cat "$ROOT/pyproject.toml" "$ROOT/setup.py"; } | cksum | tr ' ' '-'
}

tamis_setup() {
    local extra="$1" venv base stamp log
    venv="$(choose_venv)"
    PYTHON="$venv/bin/python"
    if [ ! -x "$PYTHON" ]; then
        base="$(find_python)"  # an assignment of its own, so that its failure ends the script
        say "making a virtual environment in $venv with $("$base" -V)"
        "$base" -m venv "$venv" || die "$base -m venv failed; on Debian and Ubuntu install python3-venv."
    fi
    new_enough "$PYTHON" || die "$venv holds $("$PYTHON" -V 2>&1); Python 3.11 or newer is needed."
    stamp="$venv/.tamis-$extra"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ]; then
        say "using $venv (tamis[$extra] is up to date)"
        return
    fi
    say "installing tamis[$extra] into $venv (the first time this downloads torch, several GB)"
    log="$(mktemp)"
    if ! "$PYTHON" -m pip install --disable-pip-version-check -e "$ROOT[$extra]" >"$log" 2>&1; then
        cat "$log" >&2
        rm -f "$log"
        die "pip could not install tamis[$extra]; its output is above."
    fi
    rm -f "$log"
    fingerprint >"$stamp"
}
