"""The suites of scripts/benchmark.py, one file each.

    compare.py  sweep.py  verify_cost.py  peers.py  batch.py  bottleneck.py

A suite is a class with the interface of `suite.Suite`. What they share: `configurations.py` (how text is written),
`measuring.py` (turns, medians, percentiles), `formula.py` (what theory says), `hardware.py` (what the machine can do),
`report.py` and `figures.py` (JSON, Markdown, PNG). Other programs: `peer.py`, and a file for each (`*_peer.py`).
"""
