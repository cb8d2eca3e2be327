"""How well the model of step time explains published speeds, where it does not, and what predictions assume."""

from __future__ import annotations

import numpy as np

from scripts.planner import fit, published
from scripts.planner.counts import Counts
from scripts.planner.predict import Family

GOOD_ERROR = 0.15

ASSUMPTIONS = [
    "The bytes of our forward stand for those of the software that was measured, and a layer of ours is taken to need, "
    "besides its bytes, what one of 2026 needs. The bands hold a layer of 2025 on Blackhole, and on Wormhole one "
    "with less in proportion to its programs (16 for about 27).",
    "No credit for fewer programs on Blackhole: there a decode of 8B as one program took 7.54 ms, as 999 programs "
    "7.63 (P300x2, 2026-09).",
    f"Fidelity costs {fit.PHASE_CYCLES} cycles a phase and tile on the cores beside the DRAM banks, on Blackhole; on "
    "Wormhole reading the weights hides it.",
    "The host's time is paid once a round; half of it as the device's, for every drafted token, is within the bands.",
    "Matmuls take for up to 32 rows what they take for one, since a tile has 32 rows. Every row of a verification "
    "reads the KV cache by itself, on --attention-cores cores for each KV head (1 by default; tt_transformers takes up "
    f"to {published.MOST_ATTENTION_CORES}), as long as the chip has cores.",
    "A band spans all models of step time that explain the published speeds, with figures left out in turn, and the "
    "error of held-out figures. It knows nothing of races, hangs, or a kernel that is slower than its kind.",
]


def fitted(counts: Counts, family: Family) -> dict:
    """The fit as JSON has it; errors are of predicted / published tokens per second."""
    observations = [published.observation(point, counts) for point in published.POINTS]
    errors = fit.errors(observations)
    alone = fit.left_out(observations)
    grouped = fit.left_out(observations, key=lambda o: o.point.group)
    fitted_to = zip(observations, errors, alone, grouped, strict=True)
    points = [
        _point(o, float(error)) | {"left_out_error": float(out), "group_left_out_error": float(group)}
        for o, error, out, group in fitted_to
    ]
    coefficients = family.coefficients[0]
    excluded = [
        _point(o, o.ms / float(fit.factors(fit.FORM, o.step) @ coefficients) - 1) | {"excluded": o.point.excluded}
        for o in (published.observation(point, counts) for point in published.ALL if point.excluded)
    ]
    boards = dict.fromkeys(point["board"] for point in points)
    parameters = dict(zip(fit.FORM, map(float, coefficients), strict=True))
    years = sorted({o.point.year for o in observations})
    measured = np.array([p["error"] for p in points] + [p["error"] for p in excluded if p["possible"]])
    return {
        "median_error": _median(errors),
        "leave_one_out_median_error": _median(alone),
        "group_left_out_median_error": _median(grouped),
        "leave_one_out_median_error_by_year": {
            str(year): _median(np.array([e for e, o in zip(alone, observations, strict=True) if o.point.year == year]))
            for year in years
        },
        "all_measured_median_error": _median(measured),
        "spread": family.spread,
        "largest_error_by_board": {
            board: max(abs(p["error"]) for p in points if p["board"] == board) for board in boards
        },
        "points": points,
        "excluded": excluded,
        "parameters": parameters,
        "parameters_in_words": in_words(parameters),
        "forms": [_form(name, observations, form) for name, form in fit.FORMS.items()],
        "caveats": caveats(points),
    }


def _point(observation: fit.Observation, error: float) -> dict:
    point = observation.point
    return {
        "model": point.model,
        "board": point.board,
        "precision": point.precision,
        "fidelities": dict(point.fidelities),
        "context": point.context,
        "published": point.tok_s_user,
        "date": point.date,
        "software": point.software,
        "source": point.source,
        "waits": point.waits,
        "served": point.served,
        "possible": point.possible,
        "predicted": point.tok_s_user * (1 + error),
        "error": error,
    }


def _form(name: str, observations: list[fit.Observation], form: tuple[str, ...]) -> dict:
    left_out = fit.left_out(observations, form)
    grouped = fit.left_out(observations, form, key=lambda o: o.point.group)
    return {
        "form": name,
        "terms": list(form),
        "median_error": _median(fit.errors(observations, form)),
        "leave_one_out_median_error": _median(left_out),
        "leave_one_out_rms_error": float(np.sqrt(np.mean(left_out**2))),
        "group_left_out_rms_error": float(np.sqrt(np.mean(grouped**2))),
    }


def _median(errors: np.ndarray) -> float:
    return float(np.median(np.abs(errors)))


def in_words(parameters: dict[str, float]) -> dict[str, str]:
    """The coefficients as people know them."""
    layers = (f"{parameters[name]:.0f}" for name in fit.FORM if "layer" in name)
    wormhole, then, now = layers
    return {
        "DRAM": f"{1 / parameters['wormhole_bytes']:.0%} of the published bandwidth on Wormhole (at most "
        f"{fit.MOST_EFFICIENCY:.0%}), {1 / parameters['blackhole_bytes']:.0%} on Blackhole",
        "KV cache": f"{parameters['kv_block_us']:.1f} us for 128 positions of a KV head on one core at 1 GHz",
        "a layer besides": f"{wormhole} us on Wormhole, on Blackhole {then} with software of 2025, {now} of 2026",
        "an exchange": f"{parameters['exchange_us']:.1f} us",
        "a host that waits for each token": f"{parameters['host_ms']:.1f} ms",
        "a server of 2025": f"{parameters['server_2025_ms']:.1f} ms more",
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
        "scale over chips does not follow from bytes, layers and exchanges alone."
    ]
