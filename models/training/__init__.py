"""Training an EAGLE-3 draft head for a Llama: from prompts to a checkpoint that the engine loads.

Stages, each of which leaves its result in a work directory:

    prompts    token ids; of a file, or built in
    answers    the target's own continuations, with its hidden states: shards of safetensors
    training   the head learns from the shards; its state is saved every few minutes
    checkpoint the head in the SpecForge layout, with a model card

`job.train_head` runs them all. Shape letters are those of `models.llama`, and T: tokens of an answer with its prompt,
R: rows (positions) that are trained, of all sequences of a batch one after another, V: the draft vocabulary.
"""
