"""How well the model of step time explains published speeds, where it does not, and what predictions assume."""

from __future__ import annotations

import numpy as np

from scripts.planner import fit, published
from scripts.planner.counts import Counts
from scripts.planner.predict import Family

GOOD_ERROR = 0.15

ASSUMPTIONS = [
    "The bytes of our forward stand for those of tt_transformers. A layer of it is taken to have "
    f"{published.LAYER_PROGRAMS} programs ({published.LAYER_PROGRAMS_RANGE[0]} and {published.LAYER_PROGRAMS_RANGE[1]} "
    "are within the bands), ours has 16 to 18 and its exchanges: what a program costs was fitted to another "
    "implementation.",
    "Half of the fixed time of a step is taken to be the device's, paid for every drafted token, half the host's, "
    "paid once a round; none and all are within the bands.",
    "Matmuls take for up to 32 rows what they take for one, since a tile has 32 rows. Every row of a verification "
    f"reads the KV cache by itself, at best at the rate seen with {fit.MOST_STREAMS} KV heads on a chip; Blackhole is "
    "taken to read it as Wormhole does.",
    "A band spans all models of step time that explain the published speeds, with figures left out in turn, and the "
    "error of held-out figures. It knows nothing of races, hangs, or a kernel that is slower than its kind.",
]
NEWER = (
    "Software and hosts have changed since: in 2026 1B on T3K was measured at 153.5 t/s/u (tt-metal issue 49282), 8B "
    "on P150 at 38.5 (issue 48885) and 40.2, after changes 51.5 (pull request 50662). Blackhole has two figures here, "
    "of one model, from 2025: take what is predicted for P150 as a lower bound."
)


def fitted(counts: Counts, family: Family) -> dict:
    """The fit as JSON has it; errors are of predicted / published tokens per second."""
    observations = [published.observation(point, counts) for point in published.POINTS]
    errors = fit.errors(observations)
    alone = fit.left_out(observations)
    grouped = fit.left_out(observations, key=lambda o: o.point.group)
    points = [
        {
            "model": o.point.model,
            "board": o.point.board,
            "precision": o.point.precision,
            "context": o.point.context,
            "published": o.point.tok_s_user,
            "predicted": o.point.tok_s_user * (1 + float(error)),
            "error": float(error),
            "left_out_error": float(out),
            "group_left_out_error": float(group),
            "source": o.point.source,
        }
        for o, error, out, group in zip(observations, errors, alone, grouped, strict=True)
    ]
    boards = dict.fromkeys(point["board"] for point in points)
    parameters = dict(zip(fit.FORM, map(float, family.coefficients[0]), strict=True))
    return {
        "median_error": _median(errors),
        "leave_one_out_median_error": _median(alone),
        "group_left_out_median_error": _median(grouped),
        "spread": family.spread,
        "largest_error_by_board": {
            board: max(abs(p["error"]) for p in points if p["board"] == board) for board in boards
        },
        "points": points,
        "parameters": parameters,
        "parameters_in_words": in_words(parameters),
        "forms": [_form(name, observations, form) for name, form in fit.FORMS.items()],
        "source": published.SOURCE,
        "caveats": [*caveats(points), NEWER],
    }


def _form(name: str, observations: list[fit.Observation], form: tuple[str, ...]) -> dict:
    left_out = fit.left_out(observations, form)
    return {
        "form": name,
        "terms": list(form),
        "median_error": _median(fit.errors(observations, form)),
        "leave_one_out_median_error": _median(left_out),
        "leave_one_out_rms_error": float(np.sqrt(np.mean(left_out**2))),
    }


def _median(errors: np.ndarray) -> float:
    return float(np.median(np.abs(errors)))


def in_words(parameters: dict[str, float]) -> dict[str, str]:
    """The coefficients as people know them."""
    many, one = (
        1 / (parameters["kv_bytes"] + factor * parameters["kv_bytes_per_stream"]) for factor in (1, fit.MOST_STREAMS)
    )
    return {
        "DRAM": f"{1 / parameters['wormhole_bytes']:.0%} of the published bandwidth on Wormhole (at most "
        f"{fit.MOST_EFFICIENCY:.0%}), {1 / parameters['blackhole_bytes']:.0%} on Blackhole",
        "KV cache": f"{many:.0%} of it with {fit.MOST_STREAMS} KV heads on a chip, {one:.0%} with one",
        "a program": f"{parameters['program_us']:.1f} us (if a layer has {published.LAYER_PROGRAMS})",
        "a hop of an exchange": f"{parameters['hop_us']:.1f} us",
        "a step": f"{parameters['step_ms']:.1f} ms",
    }


def caveats(points: list[dict]) -> list[str]:
    """Where predictions for a model on a board miss what was published when none of its figures was fitted."""
    worst: dict[tuple[str, str], float] = {}
    for point in points:
        key = point["model"], point["board"]
        worst[key] = max(worst.get(key, 0.0), point["group_left_out_error"], key=abs)
    missed = [f"{model} on {board} {error:+.0%}" for (model, board), error in worst.items() if abs(error) > GOOD_ERROR]
    if not missed:
        return []
    return [
        f"Not predicted within {GOOD_ERROR:.0%} when its own figures are left out: {', '.join(missed)}. How models "
        "scale over chips does not follow from bytes, programs and hops alone."
    ]
