#!/usr/bin/env bash
# lmms-eval on the base and on each variant of this sweep, or on those that are named:
#
#     bash evaluate.sh            all of them, but for what results/ has already
#     bash evaluate.sh base @NAME@
#     sbatch evaluate.sbatch      each as a task of a SLURM array; from this folder
#
# These may be set: MODEL, what lmms-eval calls the family; ARGS, more of its --model_args (dtype=bfloat16); TASKS,
# LIMIT, SOURCE, PYTHON.
#
# No class of lmms-eval takes an adapter as an argument. But where peft is installed, transformers loads an adapter that
# lies beside the weights: so a variant with one is a folder of links, to the base's files and to the adapter's. Any other
# is a checkpoint, which is made for its evaluation and removed afterwards.
set -euo pipefail
if [[ -n ${SOURCE:-} ]]; then SOURCE=$(realpath -- "$SOURCE"); fi # as seen from where it was said
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
python=${PYTHON:-python}
case @FAMILY@ in
    llava | llava_next | llava_onevision) model=llava_hf ;;
    mllama) model=llama_vision ;;
    internvl) model=internvl_hf ;;
    gemma3 | idefics2 | phi4_multimodal | qwen2_vl | qwen2_5_vl | qwen3_vl) model=@FAMILY@ ;;
    *) model=${MODEL:?must be set to what lmms-eval calls this family} ;;
esac
model=${MODEL:-$model}
source=@SOURCE@
asked=" $* "
known=" @KNOWN@ "
for name; do
    if [[ $known != *" $name "* ]]; then
        echo "there is no variant $name; there are:$known" >&2
        exit 2
    fi
done

evaluate() {
    local name=$1 place=checkpoints/@BASE@-$1
    shift
    if [[ $asked != "  " && $asked != *" $name "* ]] || [[ -e results/$name/done ]]; then return; fi
    echo "== $name"
    rm -rf -- "$place"
    mkdir -p checkpoints
    if [[ $name == base ]]; then
        ln -s -- "$source" "$place"
    elif [[ -d $name ]]; then
        # Else transformers would leave the adapter out, and say nothing.
        "$python" -c 'import peft' || { echo "peft is needed: set PYTHON to one that has it" >&2; exit 1; }
        mkdir -- "$place"
        ln -s -- "$source"/* "$PWD/$name"/adapter_* "$place"
    elif [[ -f $name.qkpatch ]]; then
        "$python" -m qkpatch apply "$source" --patch "$name.qkpatch" -o "$place" --quiet
    else
        "$python" -m qkpatch apply "$source" "$@" -o "$place" --quiet
    fi
    "$python" -m lmms_eval --model "$model" --model_args "pretrained=$place${ARGS:+,$ARGS}" \
        --tasks "${TASKS:-pope,coco_cap_chair}" ${LIMIT:+--limit "$LIMIT"} --batch_size 1 \
        --log_samples --output_path "results/$name"
    mkdir -p -- "results/$name"
    touch -- "results/$name/done"
    rm -rf -- "$place"
}

@VARIANTS@
