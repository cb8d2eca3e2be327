"""Records what SpecForge computes with draft heads in its own layout, for `test_head_specforge.py`.

Not run by the tests. It needs an environment of its own with torch, transformers 5 and specforge 0.2.0:

    python models/tests/record_specforge_heads.py models/tests/data/specforge_heads.safetensors

Small random heads draft from every position of a text at once, in 8 unrolled steps along the text as in training: step
0 reads the target's states, later ones the head's own. Past the text's end the token 0 is fed. The file holds weights,
states, ids, all logits, and the configurations.
"""

import json
import sys

import torch
from safetensors.torch import save_file

VOCABULARY, DRAFT, HIDDEN, LENGTH, STEPS = 48, 20, 16, 24, 8
SIZES = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "draft_vocab_size": DRAFT,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "plain": {},
    "fc_norm": {"fc_norm": True},
    "whole_vocabulary": {"draft_vocab_size": VOCABULARY},
    "scaled_rope": {"rope_theta": 500000.0, "rope_scaling": SCALED},
    "wide_heads": {"head_dim": 8, "fc_norm": True},
    "wide_target": {"target_hidden_size": 24},
}


def record(values):
    """(state dict, states [n, taps x H], tokens [n + 1], logits [steps, n, V_d])"""
    from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3, prepare_decoder_attention_mask
    from transformers import LlamaConfig

    rope = {"rope_theta": values.get("rope_theta", 10000.0), **values.get("rope_scaling", {"rope_type": "default"})}
    others = {key: value for key, value in values.items() if not key.startswith("rope")}
    torch.manual_seed(0)
    model = LlamaForCausalLMEagle3(LlamaConfig(**others, rope_parameters=rope)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            drawn = (parameter.ndim == 1) + spread * torch.randn(parameter.shape)
            parameter.copy_(drawn.half())  # as they are kept
    ids = torch.randperm(VOCABULARY)[: values["draft_vocab_size"]].sort().values
    model.d2t.copy_(ids - torch.arange(len(ids)))
    model.t2d.zero_()[ids] = True

    width = 3 * values.get("target_hidden_size", HIDDEN)
    states, tokens = torch.randn(1, LENGTH, width), torch.randint(0, VOCABULARY, (1, LENGTH + 1))
    positions, cache, fed, logits = torch.arange(LENGTH)[None], [[], []], tokens[:, 1:], []
    with torch.no_grad():
        hidden = model.project_hidden_states(states)
        mask = prepare_decoder_attention_mask(torch.ones(1, LENGTH, dtype=torch.bool), (1, LENGTH), hidden, 0)
        for _ in range(STEPS):
            hidden = model.backbone(model.embed_input_ids(fed), hidden, cache, mask, positions)
            logits.append(model.compute_logits(hidden)[0])
            fed = torch.cat((fed[:, 1:], torch.zeros_like(fed[:, :1])), dim=1)
    return model.state_dict(), states[0], tokens[0], torch.stack(logits)


def main(path):
    tensors, configs = {}, {}
    for name, options in CASES.items():
        configs[name] = SIZES | options
        weights, states, tokens, logits = record(configs[name])
        kept = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
        kept |= {"text/states": states, "text/tokens": tokens, "text/logits": logits}
        tensors |= {f"{name}/{key}": value.contiguous() for key, value in kept.items()}
    save_file(tensors, path, metadata={"configs": json.dumps(configs)})


if __name__ == "__main__":
    main(sys.argv[1])
