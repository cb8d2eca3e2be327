"""The steps of `scripts/first_hour.py`: what is tried on a board that nobody has used yet, in order.

steps       all of them, with what each shows and what to try where it surprises
record      what a step found: numbers, surprises, what could not be shown
bench       the board, its mesh and the one-layer model that the first steps share
reference   the same layer in torch
kernels     one op or one module against torch
programs    sums over chips, replayed traces
texts       whole texts of the embedded pair and of the user's own
"""
