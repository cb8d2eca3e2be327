"""This project beside transformers' `generate` on the same weights, threads and prompts, in one process.

    python scripts/compare_hf.py                          # the embedded pair
    python scripts/compare_hf.py --dtype fp32 --json hf.json
    python scripts/compare_hf.py --target DIR --draft DIR --num-draft-tokens 3

Four ways to write the same greedy text take turns, prompt by prompt: this project's plain and speculative decoding,
`generate()` and `generate(assistant_model=...)`. The assistant runs twice: with this project's number of draft
tokens (constant, no confidence threshold) and with transformers' own defaults; the faster of the two is compared.
A rate is new tokens over wall-clock seconds of the whole call, prefill included, the same for all. Ratios are taken
within one repetition; the median over repetitions is reported, with the smallest and the largest.

All model, prompt and generation flags of demo/simple_text_demo.py apply (greedy only).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo.arguments import Settings, parse_settings, read_prompts
from models.command_line import Parser, run_command
from models.errors import UserError

OWN_PLAIN, OWN_SPECULATIVE = "own baseline", "own speculative"
HF_PLAIN, HF_ASSISTED, HF_DEFAULTS = "HF generate", "HF assisted, same K", "HF assisted, defaults"
Generate = Callable[[list[int]], list[int]]


def own_runners(session) -> dict[str, Generate]:
    """This project's two ways, as functions from prompt ids to new ids."""
    from models.speculative.controller import FixedDraftLength
    from models.speculative.drafters.model import ModelDrafter
    from models.speculative.generate import generate

    settings = session.settings

    def run(ids: list[int], speculative: bool) -> list[int]:
        tokens = generate(
            session.target.model,
            ModelDrafter(session.draft.model, session.sampling) if speculative else None,
            ids,
            controller=FixedDraftLength(settings.num_draft_tokens) if speculative else None,
            max_new_tokens=settings.max_new_tokens,
            stop_ids=session.stop_ids,
        )
        return [token.id for token in tokens]

    return {OWN_PLAIN: lambda ids: run(ids, False), OWN_SPECULATIVE: lambda ids: run(ids, True)}


def hf_runners(session) -> dict[str, Generate]:
    """transformers' three ways. Settings of assisted generation are read from the assistant's generation_config."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from models.llama.torch_llama import DTYPES

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = session.settings

    def load(opened):
        model = AutoModelForCausalLM.from_pretrained(
            opened.checkpoint.path, dtype=DTYPES[settings.dtype], attn_implementation="sdpa", local_files_only=True
        )
        return model.to(settings.device).eval()

    target, same_k, defaults = load(session.target.opened), load(session.draft.opened), load(session.draft.opened)
    config = same_k.generation_config
    config.num_assistant_tokens = settings.num_draft_tokens
    config.num_assistant_tokens_schedule = "constant"
    config.assistant_confidence_threshold = 0.0

    def run(ids: list[int], assistant) -> list[int]:
        prompt = torch.tensor([ids], device=settings.device)
        out = target.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            assistant_model=assistant,
            do_sample=False,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=list(session.stop_ids) or None,
            pad_token_id=0,
            use_cache=True,
        )
        return out[0, len(ids) :].tolist()

    return {
        HF_PLAIN: lambda ids: run(ids, None),
        HF_ASSISTED: lambda ids: run(ids, same_k),
        HF_DEFAULTS: lambda ids: run(ids, defaults),
    }


def measure(runners: dict[str, Generate], prompts: list[list[int]], repeats: int) -> tuple[dict, dict]:
    """Rates [repeat] in tok/s by runner, and the new ids [prompt] by runner. The first pass is warm-up, uncounted."""
    rates: dict[str, list[float]] = {name: [] for name in runners}
    texts: dict[str, list[list[int]]] = {}
    for repeat in range(-1, repeats):
        seconds, counts = dict.fromkeys(runners, 0.0), dict.fromkeys(runners, 0)
        texts = {name: [] for name in runners}
        for number, prompt in enumerate(prompts):
            names = list(runners)
            shift = (number + repeat) % len(names)
            for name in names[shift:] + names[:shift]:
                began = time.perf_counter()
                ids = runners[name](prompt)
                seconds[name] += time.perf_counter() - began
                counts[name] += len(ids)
                texts[name].append(ids)
        if repeat >= 0:
            for name in runners:
                rates[name].append(counts[name] / seconds[name])
    return rates, texts


def ratio(rates: dict[str, list[float]], above: str, below: Sequence[str]) -> dict[str, float]:
    """Median, smallest and largest ratio, within each repetition, of one rate to the best of some others."""
    values = [own / max(others) for own, *others in zip(rates[above], *(rates[name] for name in below), strict=True)]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def compare(settings: Settings, repeats: int) -> dict:
    """Run the comparison; the results dictionary that is printed and written as JSON."""
    import torch

    from demo.environment import machine, versions
    from demo.report import describe_settings
    from demo.session import Session

    session = Session(settings, read_prompts(settings))
    with torch.inference_mode():
        runners = {**own_runners(session), **hf_runners(session)}
        rates, texts = measure(runners, [prompt.ids for prompt in session.prompts], repeats)
    plain, assisted = ratio(rates, OWN_PLAIN, [HF_PLAIN]), ratio(rates, OWN_SPECULATIVE, [HF_ASSISTED, HF_DEFAULTS])
    return {
        "baseline_ratio": plain["median"],
        "speculative_ratio": assisted["median"],
        "baseline_ratio_range": [plain["min"], plain["max"]],
        "speculative_ratio_range": [assisted["min"], assisted["max"]],
        "tok_s": {name: statistics.median(values) for name, values in rates.items()},
        "tok_s_by_repeat": rates,
        "same_text_as_own_baseline": {
            name: sum(a == b for a, b in zip(ids, texts[OWN_PLAIN], strict=True)) for name, ids in texts.items()
        },
        "prompts": len(session.prompts),
        "repeats": repeats,
        "settings": describe_settings(session),
        "versions": versions(),
        "machine": machine(settings.device),
    }


def print_results(results: dict) -> None:
    rows = [("", "tok/s (median)", "same text as own baseline")]
    for name, rate in results["tok_s"].items():
        rows.append((name, f"{rate:.1f}", f"{results['same_text_as_own_baseline'][name]} of {results['prompts']}"))
    for name, rate, same in rows:
        print(f"{name:24}{rate:>16}{same:>28}")
    for label, key in (("baseline / HF generate", "baseline"), ("speculative / best HF assisted", "speculative")):
        low, high = results[f"{key}_ratio_range"]
        print(f"{label:32}{results[f'{key}_ratio']:.2f}x   ({low:.2f} to {high:.2f}, {results['repeats']} repetitions)")


def command(argv: Sequence[str] | None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="counted repetitions (default: 3)")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    options, rest = parser.parse_known_args(argv)
    settings = parse_settings(rest)
    if options.repeats < 1:
        raise UserError(f"--repeats {options.repeats}: must be at least 1")
    if settings is None or settings.temperature or settings.mode != "compare" or settings.draft_dtype != settings.dtype:
        raise UserError(
            "compare_hf.py compares greedy text in one dtype: leave out --temperature, --mode, --draft-dtype"
        )
    if settings.auto or settings.drafter != "model":
        raise UserError(
            "compare_hf.py compares drafts of one model and one length: leave out --drafter, and give "
            "--num-draft-tokens a number"
        )
    if settings.device == "tt":
        raise UserError("--device tt: transformers does not run on a Tenstorrent board, compare with --device cpu")
    from demo.environment import check_writable, write_json
    from models.llama.device import check_device

    if options.json:
        check_writable(options.json)
    check_device(settings.device)
    results = compare(settings, options.repeats)
    print_results(results)
    if options.json:
        write_json(options.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: command(None)))
