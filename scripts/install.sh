# Sourced: how the set-up scripts speak, and how they install into or beside .venv.
# shellcheck shell=sh

say() { printf 'jattn: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# Set before it is used: $log, the file that takes the output of what is run.
logged() { "$@" </dev/null >"$log" 2>&1; }

error_line() {
    { grep -i '^ *error' "$log" || tail -n 1 "$log"; } | head -n 1 | cut -c 1-200
}

# Whether .venv's Python runs and finds the packages named. It can be gone, or be another one since a system upgrade.
python_works() {
    .venv/bin/python - "$@" 2>/dev/null <<'PYTHON'
import sys
from importlib.util import find_spec
sys.exit(sys.version_info < (3, 12) or not all(map(find_spec, sys.argv[1:])))
PYTHON
}

# pip's arguments, for .venv's Python: by uv if there is one, else by pip.
pip_install() {
    if command -v uv >/dev/null; then
        logged uv pip install --python .venv/bin/python "$@" && return
        say "uv could not install ($(error_line)), trying pip"
    fi
    python_works pip || logged .venv/bin/python -m ensurepip || return
    logged .venv/bin/python -m pip install --disable-pip-version-check "$@"
}

# Two runs at once would install over each other. macOS has no flock.
wait_for_other_runs() {
    command -v flock >/dev/null || return 0
    exec 9<Makefile
    flock -n 9 || { say 'waiting for another run that is installing'; flock 9; }
}
