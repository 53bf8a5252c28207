"""A subject between the toy and a real model: SmolLM2-135M, as it was trained, looking through the toy's eyes.

    model → training → look

A ``LlavaForConditionalGeneration`` whose language model is frozen: only the projector between both is made here.
"""
