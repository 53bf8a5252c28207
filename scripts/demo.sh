#!/usr/bin/env bash
# The main job on real weights: look, plan, edit, prove, and let both models speak.
#   scripts/demo.sh BIN        BIN is the bin directory of an environment with qkpatch (make demo sets it up)
set -euo pipefail
bin=$1
source=.cache/fixtures/smolvlm-layout
out=out

run() { printf '\n$ %s\n' "$*"; "$bin/$1" "${@:2}"; }

run qkpatch inspect $source --layers 10-18
run qkpatch plan $source --layers 10-18 --modes 4
run qkpatch apply $source --layers 10-18 --modes 4 -o $out --overwrite
run qkpatch verify $out --source $source
run python scripts/generate.py $source $out
