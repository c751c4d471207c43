#!/bin/sh
# Makes .venv ready: a Python, the pinned dependencies, this project. Returns at once when it already is.
set -eu
unset CDPATH
cd "$(dirname "$0")/.."

. scripts/install.sh
log=.venv/install.log

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

create() {
    python=$(sh scripts/find_python.sh)
    say "creating .venv with $("$python" --version) ($python)"
    rm -rf .venv
    mkdir .venv
    echo incomplete >"$stamp"
    logged "$python" -m venv .venv || die "creating .venv failed: $(error_line)"
}

wait_for_other_runs

accelerator=$(accelerator)
extras=train,test,lint,docs
[ "$accelerator" = cpu ] || extras=$extras,$accelerator

# The stamp says what .venv is (the programs in it hold their path), then what was installed in it.
stamp=.venv/jattn-stamp
identity="$accelerator $PWD"
contents=$(cd scripts; cat ../pyproject.toml ../constraints.txt environment.sh find_python.sh install.sh | cksum)
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
pip_install --editable ".[$extras]" --constraint constraints.txt ||
    die "installing failed: $(error_line) (the whole log: $log)"
printf '%s\n' "$identity" "$contents" >"$stamp"
say '.venv is ready'
