"""Run real ttnn without a board, with numbers.

cluster   the board: ttnn's own mock mode, switched on for this process or for another
shadow    the numbers: each operation's golden function in torch, beside the real operation on the mock
          (shadow_tensors: what holds them, and their ways between host and device)
goldens   the golden functions that ttnn does not have, or has in another form
          (golden_cache, golden_attention: those of caches and of attention)
graph     what a function runs on a device: each op, its program, the DRAM bytes that it moves
kernels   what it hands to kernels: each one's source, defines and compile-time arguments

`python -m models.board_mock N150 SCRIPT` runs a script that way. What is real: which calls ttnn accepts, output shapes,
types and memory configurations, memory in use. What is not: kernels, their accuracy and any time.
"""
