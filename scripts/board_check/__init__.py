"""The parts of `scripts/check_board.py`.

question    what to check, from the command line, all of it checked for sense
checks      each thing that generation does, tried on the mock
answer      what came of it, for a terminal and as JSON
"""
