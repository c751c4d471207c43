#!/bin/sh
# Prints the path of a CPython to make .venv with: $JATTN_PYTHON, else one on PATH, else one of pyenv's, else one
# that uv downloads.
set -eu

series='3.12 3.13 3.14' # the pinned packages have wheels for these; the first is the one tested most

say() { printf 'jattn: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# Prints the executable behind $1 if it fits. It is run, not judged by its name: a pyenv shim answers to every name.
# What is printed is the base executable, for a virtual environment on PATH may be the .venv about to be replaced.
suitable() {
    # shellcheck disable=SC2086
    "$1" - $series 2>/dev/null <<'PYTHON'
import sys, sysconfig
import ensurepip, venv  # Debian packs these apart
usual = sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")
if not usual or "%d.%d" % sys.version_info[:2] not in sys.argv[1:]:
    sys.exit(1)
print(getattr(sys, "_base_executable", None) or sys.executable)
PYTHON
}

# Every place on PATH that has one of the names; the first name's come first.
on_path() {
    for name in "$@"; do
        printf '%s\n' "$PATH" | tr ':' '\n' | while IFS= read -r folder; do
            if [ -x "$folder/$name" ]; then echo "$folder/$name"; fi
        done
    done
}

# The newest patch release of each series first.
in_pyenv() {
    versions=${PYENV_ROOT:-${HOME:-}/.pyenv}/versions
    for wanted in $series; do
        for folder in "$versions/$wanted".*; do
            if [ -x "$folder/bin/python" ]; then echo "${folder##*/}"; fi
        done | sort -t . -k 3,3nr | sed "s|.*|$versions/&/bin/python|"
    done
}

candidates() {
    # shellcheck disable=SC2046,SC2086
    on_path $(printf 'python%s ' $series) python3 python
    in_pyenv
}

# uv as it is on PATH, else installed in the folder $1 by whatever Python there is.
find_uv() {
    if command -v uv; then return; fi
    on_path python3 python | while IFS= read -r python; do
        if "$python" -m venv "$1" && "$1/bin/python" -m pip install 'uv<1'; then
            echo "$1/bin/uv" >&3
            break
        fi </dev/null
    done 3>&1 >/dev/null 2>&1
}

from_uv() {
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    uv=$(find_uv "$folder/uv")
    if [ -z "$uv" ]; then
        say 'no uv on PATH, and none could be installed'
        return 1
    fi
    export UV_PYTHON_INSTALL_BIN=0 UV_PYTHON_PREFERENCE=only-managed
    if "$uv" python install "${series%% *}" >"$folder/log" 2>&1; then
        "$uv" python find --system "${series%% *}"
    else
        say "uv: $(sed -n 's/^ *\([^ ]\)/\1/p' "$folder/log" | tail -n 1)"
        return 1
    fi
}

if [ -n "${JATTN_PYTHON:-}" ]; then
    suitable "$JATTN_PYTHON" || die "JATTN_PYTHON=$JATTN_PYTHON is not a CPython with venv of one of: $series"
    exit
fi

python=$(candidates | while IFS= read -r candidate; do if suitable "$candidate"; then break; fi; done)
if [ -z "$python" ]; then
    say "no Python of $series (with venv) on PATH or under pyenv, asking uv for one"
    python=$(from_uv) || die "no Python of $series: install one (with venv), or set JATTN_PYTHON to its path"
fi
echo "$python"
