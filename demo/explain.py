"""Plain words on a run that speculation did not make faster: why, by the costs measured, and what to change."""

from typing import Any

from demo.results import RunResults, Speculation
from models.speculative.drafters.registry import drafts_trees


def explain_slowdown(results: RunResults) -> list[str]:
    """Why speculation was slower here and what to change, or why nothing was drafted; [] where neither was so."""
    speedup, speculative, settings = results.speedup, results.speculative, results.settings
    if speedup is None or settings["num_draft_tokens"] == 0:
        return []
    if not speculative.drafted and speculative.plain_rounds:
        return [_nothing_drafted(settings)]
    if speedup >= 1:
        return []
    if speculative.acceptance_rate is None:
        return [_too_short(results)]
    plain_ms = 1000 / results.baseline.tok_s_user
    round_ms, parts = _costs(results)
    needed, emitted = round_ms / plain_ms, speculative.mean_acceptance_length
    mixed = speculative.plain_rounds > 0
    lines = [
        f"Speculation was slower here: a round {'that drafts ' * mixed}takes {round_ms:.2f} ms ({parts}), "
        f"{needed:.2f} times a plain step of {plain_ms:.2f} ms, and emits {emitted:.2f} tokens.",
    ]
    if emitted >= needed:
        return [*lines, _rounds_pay(mixed)]
    drafted = _mean_draft(results)
    rate = (needed - 1) / speculative.mean_draft_length
    if rate > 1:
        lines.append(f"With {drafted} not even full acceptance would pay for that.")
    else:
        lines.append(
            f"It breaks even at an acceptance rate of {rate:.0%} with {drafted}; "
            f"measured were {speculative.acceptance_rate:.0%}."
        )
    return [*lines, _advice(results, plain_ms)]


def _nothing_drafted(settings: dict[str, Any]) -> str:
    """Why both paths decoded plainly."""
    reason = "drafting would not have paid, by the costs measured"
    if settings["drafter"] == "prompt-lookup":
        reason = "no passage came again that was worth a copy (prompt-lookup; --drafter model drafts new text too)"
    elif settings["drafter"] == "early-exit":
        reason += f" (early exit after layer {settings['exit_layer']}; --drafter model has a model of its own to draft)"
    return f"Nothing was drafted: {reason}. Both paths decoded plainly, and their difference is chance."


def _too_short(results: RunResults) -> str:
    settings = results.settings
    unit = "levels" if drafts_trees(settings["drafter"]) else "draft tokens"
    begin = "Speculation was slower here, and every text was too short for a whole round of"
    if results.controller:
        return f"{begin} {unit}: write more (--max-new-tokens)."
    return (
        f"{begin} {settings['num_draft_tokens']} {unit}: draft fewer (--num-draft-tokens) or write more "
        "(--max-new-tokens)."
    )


def _rounds_pay(mixed: bool) -> str:
    if mixed:
        return (
            "Rounds that draft pay; it is the rest that does not (cut rounds at the ends of the texts, plain ones "
            "where nothing was drafted): write longer texts."
        )
    return "Whole rounds pay; it is the cut ones at the ends of the texts that do not: write longer texts."


def _mean_draft(results: RunResults) -> str:
    """How much the rounds drafted."""
    count = f"{results.speculative.mean_draft_length:.1f}".removesuffix(".0")
    if drafts_trees(results.settings["drafter"]):
        return f"trees of {count} levels on average"
    return f"{count} draft tokens on average" if results.controller else f"{count} draft tokens"


def _rest_ms(speculative: Speculation) -> tuple[float, float]:
    """Milliseconds of a round outside its forwards: the host's, and its share of what the draft's prefill took."""
    return speculative.host_ms, speculative.draft_prefill_ms / speculative.rounds


def _costs(results: RunResults) -> tuple[float, str]:
    """Milliseconds of a round, and what they are made of."""
    speculative = results.speculative
    host_ms, prompt_ms = _rest_ms(speculative)
    if speculative.fused_ms is None:
        forwards_ms = speculative.draft_ms + speculative.verify_ms
        parts = [f"draft {speculative.draft_ms:.2f}, verify {speculative.verify_ms:.2f}"]
    else:
        forwards_ms = speculative.fused_ms
        parts = [f"draft and verify {forwards_ms:.2f} in one program"]
    parts.append(f"host {host_ms:.2f}")
    if results.settings["draft"]:
        parts.append(f"its share of the draft's prefill {prompt_ms:.2f}")
    return forwards_ms + host_ms + prompt_ms, ", ".join(parts)


def _advice(results: RunResults, plain_ms: float) -> str:
    """What to change, from the costs and the acceptance by position measured in this run."""
    settings, speculative = results.settings, results.speculative
    if settings["verification"] == "sequential":
        return "Sequential verification is the reason: every token costs a target forward. Leave --verification out."
    better = _better_drafts(results)
    plain, rounds = speculative.plain_rounds, speculative.rounds
    if results.controller and 2 * plain >= rounds:
        return (
            f"Its length is already chosen by these costs: {plain} of {rounds} rounds drafted nothing, and what is "
            f"still lost are trials, and chance. For more than plain decoding {better}"
        )
    if results.controller:
        return f"Its length is already chosen by these costs: write longer texts, from which it learns; or {better}"
    auto = "use --num-draft-tokens auto, which drafts only what pays; or "
    if drafts_trees(settings["drafter"]):  # a smaller one is another tree, of which nothing was measured
        return f"Try a smaller tree (--tree-nodes) or fewer levels (--num-draft-tokens): {auto}{better}"
    if speculative.fused_ms is not None:  # what one draft step takes of it is not known
        return f"Try fewer draft tokens (--num-draft-tokens): {auto}{better}"
    best, gain = _fewer_tokens(results, plain_ms)
    if best and gain > 1:
        return (
            f"Draft fewer tokens: --num-draft-tokens {best} would give about {gain:.2f}x (predicted); auto finds such "
            "a length by itself."
        )
    return f"Fewer draft tokens would not pay either: {auto}{better}"


def _fewer_tokens(results: RunResults, plain_ms: float) -> tuple[int | None, float]:
    """(the best length below the one that was drafted, the speed-up that it should give)."""
    speculative, longest = results.speculative, results.settings["num_draft_tokens"]
    accepted = speculative.acceptance_by_position
    step_ms = speculative.draft_ms / speculative.mean_draft_length
    fixed_ms = speculative.verify_ms + sum(_rest_ms(speculative))
    gains = {k: (1 + sum(accepted[:k])) * plain_ms / (k * step_ms + fixed_ms) for k in range(1, longest)}
    best = max(gains, key=gains.get, default=None)
    return best, gains[best] if best else 0.0


def _better_drafts(results: RunResults) -> str:
    """Where better drafts would come from."""
    settings = results.settings
    if settings["drafter"] == "prompt-lookup":
        return "use --drafter model or combined: this text repeats itself too little for prompt-lookup."
    if settings["drafter"] == "early-exit":
        chosen = results.early_exit
        tried = "try --exit-layer auto, or " if chosen is None else ""
        known = f"the target's first layers say too little ({settings['exit_layer']} of them here)"
        if chosen and chosen.speed_up <= 1:
            known = f"no number of the target's layers promised to pay (at best {chosen.speed_up:.2f}x)"
        return f"{tried}use --drafter model: {known}."
    if drafts_trees(settings["drafter"]):
        return "use --drafter model, whose rounds are cheaper, or a draft that is cheaper or closer to the target."
    return "use a draft that is cheaper or closer to the target."
