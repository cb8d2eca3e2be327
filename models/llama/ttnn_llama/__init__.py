"""Llama 3.x in TT-NN: prefill, decode and the verification of several tokens in one forward, on Tenstorrent boards.

boards        the boards: chips, wiring, memory
mesh          the chips opened as one mesh, or as one for the target and one for the draft
precision     named choices of number formats and of arithmetic fidelity
weights       checkpoint tensors -> the layout and the share of them that each chip holds
weight_cache  converted tensors kept on disk
memory        what a model takes of each chip's DRAM, and whether that fits

Shapes, in names and comments: R rows (positions computed in one forward), S positions in the KV cache, H hidden,
Q query heads, KV key and value heads, D head_dim, I intermediate (MLP), V vocabulary, n chips of the mesh. The suffix
"local" means per chip: KV_local = KV / n.
"""
