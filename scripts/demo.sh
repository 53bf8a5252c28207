#!/usr/bin/env bash
# The main job on a toy that can see: look, plan, edit, prove, and caption the same scenes before and after.
#   scripts/demo.sh BIN        BIN is the bin directory of an environment with qkpatch (make demo sets it up)
set -euo pipefail
bin=$1
source=demo/toy-0
out=out/toy-0
picture=out/captions.png

run() { printf '\n$ %s\n' "$*"; "$bin/$1" "${@:2}"; }

run qkpatch inspect $source
run qkpatch plan $source
run qkpatch apply $source -o $out --overwrite
run qkpatch verify $out --source $source
run python -m scripts.toy_vlm compare $source $out --picture $picture
