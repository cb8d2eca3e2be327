"""The planner: would speculative decoding pay on a Tenstorrent board, and what would make it pay more?

    counts.py       device programs and DRAM bytes of a forward, for any rows and context, from captured ones
    capture.py      captures them: ttnn's own graph on mock boards
    published.py    published decode speeds of tt_transformers: what the model is fitted to
    fit.py          step time from counts: non-negative least squares, leave-one-out errors
    predict.py      times of our own forwards, each with its band
    speculation.py  tokens per round, speed-up by draft length, break-even acceptance
    heads.py        draft heads and one-pass heads: what a round of them does, from the design, and its time
    texts.py        published acceptance of heads by kind of text, and what is made of it
    overview.py     heads of all targets on all boards
    attention.py    ways for the rows of one text to read its cache
    levers.py       what else would pay; memory
    describe.py     how well the fit holds and where not; what is assumed
    report.py       tables for people

Nothing in it has been measured on a board of ours: every time is predicted, and says so.
"""
