#!/bin/sh
# Makes .compilers/VERSION for each version of jax that the tests compile the GPU kernels with: what .venv lacks for
# that, such as the plugin for CUDA (which has no place in an environment without CUDA's libraries) and ptxas. A test
# puts the folder in front of .venv's packages. Returns at once when all are there.
set -eu
unset CDPATH
cd "$(dirname "$0")/.."
. scripts/install.sh
log=.compilers/install.log

[ "$(uname -s)" = Linux ] || exit 0 # there is no plugin for others

versions=$(cat tests/hopper/jax_versions.txt)
packages_for() {
    grep -qx "jax==$1" constraints.txt || echo "jax==$1 jaxlib==$1" # else .venv has it
    echo "jax-cuda13-plugin==$1 jax-cuda13-pjrt==$1"
    grep '^nvidia-cuda-nvcc==' constraints.txt
}

wait_for_other_runs
contents=$(.venv/bin/python --version; cat scripts/compilers.sh; for version in $versions; do packages_for "$version"; done)
[ "$(cat .compilers/ready 2>/dev/null || true)" != "$contents" ] || exit 0

rm -rf .compilers
mkdir .compilers
# shellcheck disable=SC2086
say "installing what compiles for GPUs, for jax" $versions '(about 1.5 GB; later runs reuse it)'
for version in $versions; do
    # shellcheck disable=SC2046
    pip_install --no-deps --target ".compilers/$version" $(packages_for "$version") ||
        die "installing failed: $(error_line) (the whole log: $log)"
done
printf '%s\n' "$contents" >.compilers/ready
