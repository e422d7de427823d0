#!/bin/sh
# Fetches NVIDIA's run-time compiler NVRTC for the test that compiles the GPU kernels, out of the Python package nvidia-cuda-nvrtc.
# It needs no GPU. It is NVIDIA's, under the licence in the package, and no part of sacpo.
#
#   scripts/fetch_nvrtc.sh [OUT_DIR]        OUT_DIR defaults to target/nvrtc
set -eu

package=nvidia-cuda-nvrtc==13.2.86
# of the package for Linux on x86-64
sha256=8111c5130e967b78222ea2124145f8efe9ce201b752b2579a2513100a53be1c5
out=${1:-target/nvrtc}
target=$out/libnvrtc.so.13

fail() {
    echo "fetch_nvrtc: $*" >&2
    exit 1
}

if [ ! -f "$target" ]; then
    [ "$(uname -sm)" = "Linux x86_64" ] || fail "there is a package for Linux on x86-64 only."
    command -v python3 >/dev/null || fail "python3 is needed to fetch the package. Install it and run this again."
    mkdir -p "$out"
    # Beside the target, so that the last step is a rename and an interrupted run leaves no half of a file.
    temporary=$(mktemp -d "$out/.fetch.XXXXXX")
    trap 'rm -rf "$temporary"' EXIT
    trap 'exit 1' INT TERM
    echo "$package --hash=sha256:$sha256" > "$temporary/requirements.txt"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --dest "$temporary" --require-hashes --requirement "$temporary/requirements.txt" >&2 ||
        fail "pip could not download $package. Check the network and that python3 has pip, and run this again."
    python3 -m zipfile -e "$temporary"/*.whl "$temporary/wheel" || fail "the wheel of $package cannot be unpacked."
    mv "$temporary"/wheel/nvidia/cu13/lib/libnvrtc-builtins.so.* "$out"
    mv "$temporary"/wheel/nvidia/cu13/lib/libnvrtc.so.13 "$target"
fi

echo "$target is there."
