"""Llama 3.x in TT-NN: prefill, decode and the verification of several tokens in one forward, on Tenstorrent boards.

model               a language model on one mesh: weights, cache, prefill
draft_head          an EAGLE-3 head beside its target, reading the target's hidden states
board_models        target and draft on one board: opened, loaded, prepared, closed
shapes              sizes that all of the package agrees on

device/             the chips
  mesh              opened as one mesh, or as one for the target and one for the draft
  runner            programs run eagerly, or as traces that are captured once and replayed
  collectives       sums and joins over the chips; nothing on one chip
weights/            getting a model onto a board
  precision         named choices of number formats and of arithmetic fidelity
  tensors           checkpoint tensors -> the layout and the share of them that each chip holds
  head_tensors      the same of a draft head
  weight_cache      converted tensors kept on disk
  memory            what a model takes of each chip's DRAM, whether that fits, and what would
modules/            the forward
  layout            where a model's tensors lie, and the program configuration of each matmul, bound once per board
  decoder           decode, verify, trees and chains of drafted tokens, as programs
  first_layers      the first layers of a model as its own draft (early exit)
  rows              the inputs of a forward of R rows, and the ops that depend on R
  attend            how rows attend to the cache: causal rows, rows of a tree
  kept_states       hidden states that a target's forwards leave for a head
  rope              rotary tables on the device
  kv_cache          one flat pair of tensors per layer
  attention         grouped-query attention of R rows over one cache
  mlp               down(silu(gate(x)) * up(x))
  norm              RMSNorm of the residual stream
  linear            a matmul whose weight is read from DRAM once
  lm_head           final norm, logits in pieces, argmax on the device
programs/           what runs as one program
  options           how models run on a board, as a user asks for it
  needed            which programs a generation runs, and what their traces take
  fused             a greedy round as one program: K drafted tokens and their verification
  head_round        the same with a draft head

`shapes`, `weights.precision`, `weights.memory`, `programs.options` and `programs.needed` are known without ttnn.

Shapes, in names and comments: R rows (positions computed in one forward), S positions in the KV cache, H hidden,
Q query heads, KV key and value heads, D head_dim, I intermediate (MLP), V vocabulary, n chips of the mesh. The suffix
"local" means per chip: KV_local = KV / n.
"""
