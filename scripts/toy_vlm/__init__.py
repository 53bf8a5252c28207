"""A toy vision-language model that hallucinates, trained on synthetic scenes on one CPU core in minutes.

    glyphs → scenes → vocabulary → model → training         makes checkpoints
                           captioning → scoring              says what they hallucinate

It is a real ``LlavaForConditionalGeneration`` with grouped-query attention, and a toy: 1.6 million parameters,
24 objects, captions that are lists of nouns. What is found on it need not hold for a real model.
"""
