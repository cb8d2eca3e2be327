"""What a Llama is: configuration, checkpoint, tokenizer, and the networks that run it.

- `config`: `LlamaConfig`, read from a Hugging Face config.json, and the published sizes by name
- `checkpoint`: a Hugging Face directory or hub id, checked up front; safetensors only
- `tokenizer`: encoding, the chat template, streaming text, the check that two models share a vocabulary
- `torch_llama`: `TorchLlama`, the network on CPU and CUDA

Every network fulfils `models.speculative.model.LanguageModel`; none knows a drafter.

Shape letters, used in names and comments throughout: B sequences, n rows of one forward, K drafted tokens, S cache
positions, H hidden size, Q and KV heads, D head_dim, V vocabulary.
"""
