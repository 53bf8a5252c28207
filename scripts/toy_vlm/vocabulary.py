"""Words to numbers: one token per word, in the Hugging Face formats."""

from __future__ import annotations

from typing import Any

from scripts.toy_vlm.glyphs import OBJECTS
from scripts.toy_vlm.scenes import COLOUR_NAMES

PAD, BOS, EOS, UNKNOWN, IMAGE = SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
# No scene holds more than seven objects, so no count is higher.
WORDS = (*SPECIAL, "describe", ":", ".", "colour", "count", "exists", "yes", "no",
         *map(str, range(8)), *COLOUR_NAMES, *OBJECTS)  # fmt: skip
ID = {word: number for number, word in enumerate(WORDS)}

CAPTION_PROMPT = ("describe", ":")


def make_tokenizer() -> Any:
    """A ``PreTrainedTokenizerFast`` that splits at white space and puts BOS in front."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend: Any = Tokenizer(models.WordLevel(ID, unk_token=UNKNOWN))
    backend.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ID[BOS])]
    )
    make: Any = PreTrainedTokenizerFast
    return make(
        tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE}, model_max_length=128, padding_side="left",
    )  # fmt: skip
