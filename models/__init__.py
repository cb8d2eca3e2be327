"""Speculative decoding of Llama 3.x, in two layers; dependencies point from the second to the first.

- `models.llama`: what a Llama is. Configuration, checkpoint, tokenizer, and the networks that run it.
- `models.speculative`: how text is generated. Drafters, acceptance rules, the loop, statistics.
- `models.errors`: the one exception for mistakes of the user.
- `models/checkpoints`: the trained target and draft that ship with the repository.
"""
