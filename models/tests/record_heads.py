"""Records what an independent implementation of EAGLE-3 computes, for `test_head_reference.py`.

Not run by the tests. It needs an environment of its own with torch, transformers and speculators 0.9.0:

    python models/tests/record_heads.py models/tests/data/heads.safetensors

Small random heads are drafted with from every position of a text at once, in 8 unrolled steps along the text: step 0
reads the target's states, later ones the head's own. The file holds weights, states, ids and all logits.
"""

import json
import sys

import torch
from safetensors.torch import save_file

VOCABULARY, DRAFT, HIDDEN, LENGTH, STEPS = 64, 24, 32, 14, 8
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "plain": {},
    "norm_before_residual": {"norm_before_residual": True},
    "norm_before_fc": {"norm_before_fc": True},
    "fc_norm": {"fc_norm": True},
    "norm_output": {"norm_output": True},
    "all": {"fc_norm": True, "norm_before_residual": True, "norm_output": True},
    "whole_vocabulary": {"draft_vocab_size": VOCABULARY},
    "scaled_rope": {"rope": SCALED},
    "wide_heads": {"head_dim": 16, "norm_before_fc": True, "norm_before_residual": True, "norm_output": True},
}


def record(options):
    from speculators import SpeculatorsConfig, VerifierConfig
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import LlamaConfig

    options = dict(options)
    layer = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=options.pop("head_dim", 8),
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters=options.pop("rope", ROPE),
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=options.pop("draft_vocab_size", DRAFT),
        eagle_aux_hidden_state_layer_ids=[1, 3, 5],
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=STEPS)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
        ),
        **options,
    )
    torch.manual_seed(0)
    model = Eagle3DraftModel(config).float().eval()
    ids = torch.randperm(VOCABULARY)[: config.draft_vocab_size].sort().values
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            values = (parameter.ndim == 1) + spread * torch.randn(parameter.shape)
            parameter.copy_(values.half())  # as they are kept
    states, tokens = torch.randn(1, LENGTH, 3 * HIDDEN), torch.randint(0, VOCABULARY, (1, LENGTH + 1))
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output[0].detach().clone()))
    with torch.no_grad():
        model(states, tokens[:, 1:], torch.zeros(1, LENGTH, dtype=torch.long), ttt_steps=STEPS)
    weights = {name: p.detach() for name, p in model.named_parameters() if not name.startswith("verifier")}
    if len(ids) < VOCABULARY:
        weights["d2t"] = ids - torch.arange(len(ids))
    text = {"states": states[0], "tokens": tokens[0], "logits": torch.stack(seen[:STEPS])}
    values = {key: value for key, value in config.to_dict().items() if key != "transformers_version"}
    return values, weights, text


def main(path):
    tensors, configs = {}, {}
    for name, options in CASES.items():
        values, weights, text = record(options)
        configs[name] = values
        tensors |= {
            f"{name}/{key}": value.half() if value.is_floating_point() else value for key, value in weights.items()
        }
        tensors |= {f"{name}/text/{key}": value for key, value in text.items()}
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, path, metadata={"configs": json.dumps(configs, default=str)}
    )


if __name__ == "__main__":
    main(sys.argv[1])
