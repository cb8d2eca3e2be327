"""How text is generated: draft, verify, accept, emit. Imports neither ttnn nor transformers.

- `language_model`: the protocol that every network fulfils
- `drafters`: where drafted tokens come from
- `acceptance`: the greedy and the lossless sampling rule, in torch alone
- `sampling`: temperature, top-k, top-p and seed
- `generate`: the loop; plain decoding is the same loop without a drafter
- `controller`: how many tokens to draft now
- `stats`: what happened, with exact definitions
"""
