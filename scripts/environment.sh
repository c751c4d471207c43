#!/bin/sh
# Makes .venv ready: a Python, the pinned dependencies, this project. Returns at once when it already is.
set -eu
unset CDPATH
cd "$(dirname "$0")/.."

say() { printf 'jattn: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

has_nvidia_gpu() {
    for device in /dev/nvidia[0-9]*; do
        [ ! -e "$device" ] || return 0
    done
    nvidia-smi -L 2>/dev/null | grep -q '^GPU ' # WSL has the tool but no such device files
}

accelerator() {
    case ${JATTN_ACCELERATOR:-} in
        cpu | cuda13) echo "$JATTN_ACCELERATOR" ;;
        '') if has_nvidia_gpu; then echo cuda13; else echo cpu; fi ;;
        *) die "JATTN_ACCELERATOR must be cpu or cuda13, not '$JATTN_ACCELERATOR'" ;;
    esac
}

# Whether .venv's Python runs and finds the packages named. It can be gone, or be another one since a system upgrade.
python_works() {
    .venv/bin/python - "$@" 2>/dev/null <<'PYTHON'
import sys
from importlib.util import find_spec
sys.exit(sys.version_info < (3, 12) or not all(map(find_spec, sys.argv[1:])))
PYTHON
}

logged() { "$@" </dev/null >.venv/install.log 2>&1; }

error_line() {
    { grep -i '^ *error' .venv/install.log || tail -n 1 .venv/install.log; } | head -n 1 | cut -c 1-200
}

create() {
    python=$(sh scripts/find_python.sh)
    say "creating .venv with $("$python" --version) ($python)"
    rm -rf .venv
    mkdir .venv
    echo incomplete >"$stamp"
    logged "$python" -m venv .venv || die "creating .venv failed: $(error_line)"
}

install() {
    set -- --editable ".[$extras]" --constraint constraints.txt
    if command -v uv >/dev/null; then
        logged uv pip install --python .venv/bin/python "$@" && return
        say "uv could not install ($(error_line)), trying pip"
    fi
    python_works pip || logged .venv/bin/python -m ensurepip || return
    logged .venv/bin/python -m pip install --disable-pip-version-check "$@"
}

# Two runs at once would install over each other. macOS has no flock.
if command -v flock >/dev/null; then
    exec 9<Makefile
    flock -n 9 || { say 'waiting for another run that is installing'; flock 9; }
fi

accelerator=$(accelerator)
extras=train,test,lint
[ "$accelerator" = cpu ] || extras=$extras,$accelerator

# The stamp says what .venv is (the programs in it hold their path), then what was installed in it.
stamp=.venv/jattn-stamp
identity="$accelerator $PWD"
contents=$(cat pyproject.toml constraints.txt scripts/environment.sh scripts/find_python.sh | cksum)
before=$(cat "$stamp" 2>/dev/null || true)

case $before in
    "$identity"*"$contents")
        python_works jax && exit
        create ;;
    "$identity"* | '') python_works || create ;; # no stamp: made by hand
    *) create ;;
esac

echo incomplete >"$stamp"
[ "$accelerator" = cpu ] && size='about 1 GB' || size='several GB'
say "installing the pinned dependencies for $accelerator ($size; later runs reuse them)"
install || die "installing failed: $(error_line) (the whole log: .venv/install.log)"
printf '%s\n' "$identity" "$contents" >"$stamp"
say '.venv is ready'
