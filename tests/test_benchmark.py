"""scripts/benchmark.py: formulas against simulation, what each suite writes, what it refuses, what Ctrl-C leaves."""

import itertools
import json
import math
import random
import statistics
import sys
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch

from models.cli.command import INTERRUPTED, run_command
from models.cli.console import MeasuringBar
from models.errors import UserError
from models.llama.config import NAMED_SIZES
from models.llama.random_weights import RandomWeights
from models.llama.rope import rope_tables
from models.speculative.drafters import registry
from models.speculative.drafters.prompt_lookup import PromptLookup
from models.speculative.stats import GenerationStats, Round
from models.tests.head_fixtures import write_head
from models.tests.llama_fixtures import tiny_config, write_tiny_checkpoint
from models.torch_llama.model import TorchLlama
from scripts import benchmark, tables
from scripts.suites import (
    bottleneck,
    categories,
    configurations,
    formula,
    gguf_peer,
    hardware,
    measuring,
    parts,
    peer,
    peers,
    report,
    summary,
    sweep,
)
from scripts.suites.bench import Bench
from scripts.suites.suite import model_settings
from tests.demo_fixtures import write_pair

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Flags that choose a tiny random pair, its draft often being right."""
    target, draft = write_pair(tmp_path_factory.mktemp("pair"), max_position_embeddings=2048)
    return ["--target", str(target), "--draft", str(draft)]


def run(folder, *argv):
    """Run a suite with all outputs: exit code, and what the JSON file holds."""
    files = {name: folder / f"results.{name}" for name in report.FORMATS}
    flags = [part for name, file in files.items() for part in (f"--{name}", str(file))]
    code = benchmark.command([*argv, *flags, "--quiet"])
    assert files["png"].read_bytes().startswith(PNG)
    assert files["markdown"].read_text().startswith("# ")
    return code, json.loads(files["json"].read_text())


# ---- what theory says ----


def simulated(a, k, count=20000):
    """Rounds in which every drafted token is accepted with the chance a."""
    draw = random.Random(1)
    rounds = []
    for _ in range(count):
        accepted = next((i for i in range(k) if draw.random() >= a), k)
        rounds.append(Round(drafted=k, accepted=accepted, emitted=accepted + 1))
    return rounds


@pytest.mark.parametrize("a", [0.0, 0.35, 0.8, 1.0])
@pytest.mark.parametrize("k", [0, 1, 3, 8])
def test_the_formula_is_what_simulated_rounds_give(a, k):
    c, v = 0.15, 1.2
    rounds = simulated(a, k)
    tokens, cost = sum(round.emitted for round in rounds), len(rounds) * (k * c + v)
    assert formula.speedup(a, k, c, v) == pytest.approx(tokens / cost, rel=0.02)


@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_at_the_break_even_acceptance_drafting_neither_gains_nor_loses(k):
    a = formula.break_even(k, 0.1, 1.1)
    assert 0 < a < 1 and formula.speedup(a, k, 0.1, 1.1) == pytest.approx(1.0)


def test_break_even_where_drafting_always_or_never_pays():
    assert formula.break_even(2, 0.0, 0.9) == 0.0
    assert formula.break_even(2, 1.0, 1.5) is None


@pytest.mark.parametrize("a", [0.2, 0.7])
def test_acceptance_is_found_again_in_simulated_rounds_whatever_their_length(a):
    cut = [Round(drafted=4, accepted=0, emitted=1, cut=True)] * 20000
    assert formula.acceptance(simulated(a, 2) + simulated(a, 7) + cut) == pytest.approx(a, abs=0.01)
    assert formula.acceptance([Round(0, 0, 1)]) is None


def timed(rounds, draft_s, verify_s, host_s=0.0, prefill_s=0.0):
    """Statistics of one text of these rounds."""
    for round in rounds:
        round.draft_s, round.verify_s, round.host_s = draft_s * round.drafted, verify_s, host_s
    seconds = sum(round.draft_s + round.verify_s + round.host_s for round in rounds) + prefill_s
    tokens = 1 + sum(round.emitted for round in rounds)
    return GenerationStats(tokens=tokens, rounds=rounds, decode_s=seconds, draft_prefill_s=prefill_s)


def test_where_the_formula_holds_nothing_is_left_to_explain():
    plain = timed([Round(0, 0, 1) for _ in range(100)], 0.0, 1.0)
    told = sweep.explain(3, timed(simulated(0.6, 3), 0.1, 1.2), plain)
    assert (told["a"], told["c"], told["v"]) == (pytest.approx(0.6, abs=0.01), pytest.approx(0.1), pytest.approx(1.2))
    assert told["measured"] == pytest.approx(told["formula"], rel=0.01)
    assert all(factor == pytest.approx(1.0, rel=0.01) for factor in told["factors"].values())


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("position", lambda rounds: [Round(3, 3 * (i % 2), 1 + 3 * (i % 2)) for i in range(100)]),
        ("rounds", lambda rounds: rounds + [Round(3, 0, 1, cut=True) for _ in range(4000)]),
    ],
)
def test_the_part_that_breaks_the_formula_is_the_one_that_is_named(part, change):
    plain = timed([Round(0, 0, 1) for _ in range(100)], 0.0, 1.0)
    factors = sweep.explain(3, timed(change(simulated(0.6, 3)), 0.1, 1.2), plain)["factors"]
    assert max(factors, key=lambda name: abs(factors[name] - 1)) == part and abs(factors[part] - 1) > 0.05


def test_host_and_prompt_make_up_the_rest_and_all_factors_lead_to_the_measurement():
    plain = timed([Round(0, 0, 1) for _ in range(100)], 0.0, 1.0)
    run_stats = timed(simulated(0.6, 3, 50), 0.1, 1.2, host_s=0.3, prefill_s=10.0)
    told = sweep.explain(3, run_stats, plain)
    assert math.prod(told["factors"].values()) == pytest.approx(told["measured"] / told["formula"])
    assert told["measured"] == pytest.approx(run_stats.tok_s / plain.tok_s)
    assert told["factors"]["host"] == pytest.approx(1.5 / 1.8)
    assert told["factors"]["prompt"] == pytest.approx(50 * 1.8 / (50 * 1.8 + 10))


def test_a_run_without_a_round_of_full_length_explains_nothing():
    plain = timed([Round(0, 0, 1)], 0.0, 1.0)
    assert sweep.explain(8, timed([Round(5, 5, 6, cut=True)], 0.1, 1.0), plain) is None


# ---- statistics ----


def test_every_way_has_its_turn_at_every_item_and_stands_behind_each_other_one():
    names = ["a", "b", "c"]
    order = [list(measuring.turns(repeat, 2, names)) for repeat in range(20)]
    for repetition in order:
        assert sorted(repetition) == [(item, name) for item in range(2) for name in names]
    before = Counter((a, b) for repetition in order for (i, a), (j, b) in itertools.pairwise(repetition) if i == j)
    assert len(before) == 6 and min(before.values()) > 5
    assert order == [list(measuring.turns(repeat, 2, names)) for repeat in range(20)]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95, 0.99, 1.0])
@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_percentiles_are_numpys(share, count):
    values = [random.random() for _ in range(count)]
    assert measuring.percentile(values, share) == pytest.approx(numpy.percentile(values, 100 * share))


def test_spread_and_ratios_leave_out_what_was_not_measured():
    assert measuring.spread([3.0, None, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "values": [3, None, 1, 2]}
    assert measuring.spread([None]) is None and measuring.spread([]) is None
    assert measuring.ratios([6.0, 4.0, None], [3.0, 0.0, 1.0]) == [2.0, None, None]


def test_the_winner_has_the_best_median_and_is_counted_where_it_came_first():
    rates = {"a": [5.0, 1.0, 5.0], "b": [4.0, 4.0, 4.0], "c": [9.0, 1.0, 1.0]}
    assert measuring.winner(rates) == {"name": "a", "won": 1, "repetitions": 3}
    assert measuring.winner({}) is None


def test_a_ratio_is_taken_to_the_best_of_the_others_within_a_repetition():
    rates = {"own": [6.0, 8.0, 10.0], "a": [3.0, 1.0, 5.0], "b": [2.0, 4.0, 1.0]}
    assert peers.best_ratio(rates, "own", ["a", "b"]) == [2.0, 2.0, 2.0]
    assert peers.best_ratio(rates, "own", ["a"]) == [2.0, 8.0, 2.0]


def test_tokens_of_one_block_but_the_first_need_no_wait():
    stats = GenerationStats(tokens=6, rounds=[Round(3, 2, 3), Round(1, 1, 2)])
    sample = configurations.Sample([1] * 6, stats, [0.5, 0.010, 0.0, 0.0, 0.030, 0.0], 1.0)
    told = summary.latency([sample])
    assert told["no_wait_share"] == pytest.approx(3 / 5)
    assert told["wait_ms"]["p50"] == 0.0 and told["wait_ms"]["longest"] == pytest.approx(30.0)
    assert summary.latency([configurations.Sample([1], GenerationStats(tokens=1), [0.5], 0.5)])["wait_ms"] is None


# ---- machine and models ----


@pytest.mark.parametrize(
    ("matmuls", "reading", "arithmetic", "expected"),
    [
        (0.8, 0.7, 0.1, "weights"),
        (0.8, 0.1, 0.7, "compute"),
        (0.3, 0.2, 0.2, "overhead"),
        (0.8, 0.2, 0.2, "kernels"),
    ],
)
def test_what_bounds_a_forward_of_one_second(matmuls, reading, arithmetic, expected):
    assert bottleneck.bound(1.0, matmuls, reading, arithmetic) == expected


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_parts_of_a_forward_are_those_of_the_model(dtype):
    config = tiny_config(dtype="float32")
    model = TorchLlama(config, RandomWeights(config), dtype=dtype, max_seq_len=64)
    weights = sum(linear.bytes for linear in model.linears) // model.dtype.itemsize
    assert parts.matmul_flops(model, 3) == 2 * 3 * weights
    called = []

    def noting(linear):
        return lambda x: called.append(linear) or linear(x)

    for layer in model.layers:
        for name in ("qkv", "output", "gate_up", "down"):
            setattr(layer, name, noting(getattr(layer, name)))
    model.network.head = noting(model.network.head)
    assert math.isfinite(parts.bare_matmuls(model, 3)())
    assert called == model.linears
    assert math.isfinite(parts.bare_attention(model, 3, 20)())
    assert parts.count_operations(lambda: torch.ones(2) + 1) == 2


def test_the_machines_best_rates_are_found_with_little_memory():
    assert hardware.read_bandwidth(size=2**22) > 0
    assert hardware.gemm_flops(torch.float32, side=64) > 0
    assert hardware.available_bytes() > 2**20


def test_an_unrelated_draft_has_the_drafts_shape_and_other_weights(pair):
    session = Bench(model_settings("compare", [*pair, "--prompt", "def"]), ["def"])
    other = configurations.with_unrelated_draft(session)
    assert other.target is session.target and other.draft is not session.draft
    assert other.draft.model.config.hidden_size == session.draft.model.config.hidden_size
    assert not torch.equal(other.draft.model.prefill([5, 6]), session.draft.model.prefill([5, 6]))


@pytest.mark.parametrize("drafter", [spec.name for spec in registry.specs()])
def test_every_drafter_of_the_demo_is_a_way_that_writes_the_plain_text(pair, drafter, tmp_path):
    models = pair if registry.spec_of(drafter).needs_draft_model else pair[:2]
    if drafter == "head":
        models = [*pair[:2], "--draft", str(write_head(tmp_path / "head", Path(pair[1])))]
    settings = model_settings("compare", [*models, "--drafter", drafter, "--max-new-tokens", "12"])
    session = Bench(settings, ["for i in"])
    ids = session.prompts[0].ids
    expected = configurations.write(configurations.plain_configuration(session), ids, 12)
    for length in (2, "auto"):
        sample = configurations.write(configurations.drafting_configuration(session, drafter, length), ids, 12)
        assert sample.tokens == expected.tokens
        assert len(sample.waits) == 12 and sum(sample.waits) <= sample.seconds


def test_there_are_at_least_seven_categories_with_prompts_of_their_own():
    assert len(categories.CATEGORIES) >= 7
    settings = model_settings("compare", [])
    texts = {name: categories.read_texts(name, settings) for name in categories.CATEGORIES}
    for name, category in categories.CATEGORIES.items():
        assert len(texts[name]) >= 4 if category.file else not texts[name]
    own = [text for name, some in texts.items() if not categories.CATEGORIES[name].unrelated_draft for text in some]
    assert len(set(own)) == len(own)
    ids = categories.random_ids(50, 3, 2)
    assert len(ids) == 2 and ids == categories.random_ids(50, 3, 2) != categories.random_ids(50, 4, 2)
    assert all(0 <= token < 50 for row in ids for token in row)


# ---- what the suites write ----

CIRCUMSTANCES = {"suite", "date", "command", "repeats", "interrupted", "total_s", "machine", "versions", "settings"}
SMALL = "--max-prompts 1 --max-new-tokens 8 --repeats 1".split()


def test_compare_writes_speed_ups_latency_and_winners_by_category(tmp_path, capsys):
    chosen = "code-completion,random-tokens,short-output,unrelated-draft"
    argv = f"compare --categories {chosen} --drafters model,combined --lengths 0,2 --other-lengths 1".split()
    code, results = run(tmp_path, *argv, *SMALL)
    assert code == 0 and results.keys() >= CIRCUMSTANCES and results["repeats"] == 1
    assert list(results["categories"]) == chosen.split(",")
    each = results["categories"]["code-completion"]
    assert list(each["ways"]) == [
        *("plain", "model 4 sequential", "model 1", "model auto", "combined 0", "combined 2", "combined auto")
    ]
    unrelated = results["categories"]["unrelated-draft"]
    assert list(unrelated["ways"]) == ["plain", "model 0", "model 2", "model auto"]
    assert unrelated["ways"]["model 2"]["acceptance_rate"] == 0
    assert set(unrelated["drafted_in_first_text"]) == set(unrelated["ways"])
    assert unrelated["drafted_in_first_text"]["model 2"][:5] == [2] * 5
    for name, each in results["categories"].items():
        assert each["ways"]["plain"]["speedup"]["values"] == [1.0]
        assert each["auto_speedup"] == each["ways"][f"{each['auto_drafter']} auto"]["speedup"]["median"]
        fixed = [f"{each['auto_drafter']} {length}" for length in (0, 2)]
        assert each["best_fixed"] in fixed
        assert each["best_fixed_speedup"] == max(
            each["ways"][configuration]["speedup"]["median"] for configuration in fixed
        )
        assert each["winner"]["won"] == each["winner"]["repetitions"] == 1
        for configuration in each["ways"].values():
            passes = categories.CATEGORIES[name].passes
            assert (
                configuration["texts_equal"] == configuration["texts"] == passes
                and configuration["tok_s"]["median"] > 0
            )
            assert (
                configuration["total_s"]["median"] > configuration["ttft_ms"]["median"] / 1000
                and configuration["init_s"] > 0
            )
            assert (
                set(configuration["wait_ms"]) == {"p50", "p95", "p99", "longest"}
                and 0 <= configuration["no_wait_share"] < 1
            )
            assert configuration["ttft_ms"]["median"] > 0 and configuration["verify_ms"] > 0
        assert each["winner_drafter"]["name"] in ("plain", "model", "combined", "model 4 sequential")
    own = ("code-completion", "random-tokens", "short-output")
    for configuration, each in results["overall"].items():
        parts = [results["categories"][name]["ways"][configuration] for name in own]
        assert each["texts"] == 6 and each["tokens"] == sum(part["tokens"] for part in parts)
        assert each["total_s"]["median"] == pytest.approx(sum(part["total_s"]["median"] for part in parts))
    mean = statistics.mean(each["auto_speedup"] for each in results["categories"].values())
    assert results["mean_auto_speedup"] == pytest.approx(mean)
    assert results["models"]["draft"]["weight_bytes"] > 0 and results["models"]["target"]["load_s"] > 0
    assert "## short-output" in capsys.readouterr().out == (tmp_path / "results.markdown").read_text()


def test_compare_without_a_draft_model_has_neither_its_ways_nor_its_category(tmp_path, pair):
    argv = ["compare", *pair[:2], "--drafters", "prompt-lookup", "--auto-drafter", "prompt-lookup", "--lengths", "1"]
    _, results = run(tmp_path, *argv, "--categories", "short-output,unrelated-draft", *SMALL)
    assert list(results["categories"]) == ["short-output"] and results["models"]["draft"] is None
    assert list(results["categories"]["short-output"]["ways"]) == ["plain", "prompt-lookup 1", "prompt-lookup auto"]


def test_sweep_sets_formula_beside_measurement(tmp_path):
    code, results = run(tmp_path, "sweep", "--longest", "2", *SMALL[:-1], "2")
    assert code == 0 and results.keys() >= CIRCUMSTANCES and set(results["lengths"]) == {"0", "1", "2"}
    for k, each in results["lengths"].items():
        product = math.prod(each["factors"][part]["values"][0] for part in sweep.PARTS)
        ratio = each["speedup"]["values"][0] / each["formula"]["values"][0]
        assert product == pytest.approx(ratio) and each["deviation"]["values"][0] == pytest.approx(ratio - 1)
        a, c, v = (each[key] and each[key]["values"][0] for key in ("a", "c", "v"))
        assert each["formula"]["values"][0] == pytest.approx(formula.speedup(a or 0.0, int(k), c, v))
    assert results["auto"]["mean_draft_length"] is None or results["auto"]["mean_draft_length"] > 0
    assert str(results["best"]) in results["lengths"]


@pytest.mark.parametrize("drafter", ["prompt-lookup", "tree"])
def test_sweep_takes_other_drafters(tmp_path, pair, drafter):
    models = pair if drafter == "tree" else pair[:2]
    argv = ["sweep", *models, "--drafter", drafter, "--longest", "8", "--prompt", "for i in for i in for i"]
    code, results = run(tmp_path, *argv, "--max-new-tokens", "24", "--repeats", "1")
    assert code == 0 and results["drafter"] == drafter and len(results["lengths"]) == 9
    assert results["settings"]["row_invariant"] is False


def test_verify_cost_times_all_ways_at_all_rows_of_a_checkpoint(tmp_path, capsys):
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny", tiny_config(dtype="bfloat16"))
    argv = f"verify-cost {checkpoint} --rows 1,4,6 --fixed-rows 4 --contexts 40,100 --repeats 2".split()
    code, results = run(tmp_path, *argv)
    [model] = results["models"].values()
    assert code == 0 and results.keys() >= CIRCUMSTANCES and results["read_gb_s"] > 0
    assert {
        configuration: {context: set(cells) for context, cells in each.items()}
        for configuration, each in model["ms"].items()
    } == {
        "compiled": {"40": {"1", "4", "6"}, "100": {"1", "4", "6"}},
        "any rows": {"40": {"1", "4", "6"}, "100": {"1", "4", "6"}},
        "fixed 4 rows": {"40": {"1", "4"}, "100": {"1", "4"}},
        "HF": {"40": {"1", "4", "6"}, "100": {"1", "4", "6"}},
    }
    cell = model["ms"]["any rows"]["40"]["4"]
    one = model["ms"]["any rows"]["40"]["1"]["values"]
    assert cell["ratio"] == pytest.approx(statistics.mean(a / b for a, b in zip(cell["values"], one, strict=True)))
    speed = model["one_row"]["100"]
    kv = 100 * model["kv_bytes_per_position"]
    assert speed["weights_and_kv_gb_s"] / speed["weights_gb_s"] == pytest.approx(1 + kv / model["weight_bytes"])
    assert not model["random_weights"] and "fixed 4 rows" in capsys.readouterr().out


def test_verify_cost_in_int8_times_own_layers_alone(tmp_path):
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny", tiny_config(dtype="bfloat16"))
    argv = f"verify-cost {checkpoint} --dtype int8 --rows 1,3 --contexts 40 --repeats 1 --layers compiled".split()
    code, results = run(tmp_path, *argv)
    [model] = results["models"].values()
    assert code == 0 and list(model["ms"]) == ["compiled"]
    assert model["weight_bytes"] < 1.1 * model["parameters"]


def test_verify_cost_makes_sizes_in_memory_and_skips_what_does_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(NAMED_SIZES, "llama-x-small", tiny_config(dtype="bfloat16"))
    monkeypatch.setattr(hardware, "available_bytes", lambda: 10**9)
    _, results = run(tmp_path, *"verify-cost small 8b --rows 1 --contexts 16 --repeats 1".split())
    assert list(results["models"]) == ["small"] and results["models"]["small"]["random_weights"]
    [skipped] = results["skipped"]
    assert skipped["model"] == "8b" and 16e9 < skipped["needed_bytes"] < 18e9
    assert "8b: skipped, it needs 17.1 GB and 1.0 GB were free" in capsys.readouterr().out


def test_peers_write_the_same_greedy_text_in_fp32_and_what_is_missing_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, results = run(
        tmp_path,
        *"peers --peers transformers,llama.cpp --dtype fp32 --max-prompts 2 --max-new-tokens 12 --repeats 2".split(),
    )
    assert code == 0 and results.keys() >= CIRCUMSTANCES
    named = [peer.OWN_PLAIN, peer.OWN_MODEL, peer.OWN_LOOKUP, peer.OWN_AUTO]
    named += [peer.HF_PLAIN, peer.HF_ASSISTED, peer.HF_DEFAULTS, peer.HF_LOOKUP]
    assert list(results["ways"]) == named
    assert {configuration["same_text_as_own_baseline"] for configuration in results["ways"].values()} == {2}
    own, hf = (results["ways"][name]["tok_s"]["values"] for name in (peer.OWN_PLAIN, peer.HF_PLAIN))
    expected = [a / b for a, b in zip(own, hf, strict=True)]
    assert results["baseline_ratio"]["values"] == pytest.approx(expected)
    assert results["ways"][peer.HF_PLAIN]["own_over_this"]["values"] == pytest.approx(expected)
    assert "llama.cpp is left out" in results["notes"][0]
    assert "speculative / best HF assisted" in capsys.readouterr().out


def test_bottleneck_says_what_bounds_the_machine_and_where_drafting_breaks_even(tmp_path, capsys):
    code, results = run(tmp_path, *"bottleneck --max-prompts 1 --max-new-tokens 8 --repeats 2".split())
    assert code == 0 and results.keys() >= CIRCUMSTANCES
    assert results["bound"] in ("weights", "compute", "overhead", "kernels")
    assert results["operations"] > 100 and results["machine_best"]["read_bytes_s"] > 0
    assert 0 < results["acceptance"] <= 1 and set(results["lengths"]) == {"1", "2", "4", "6"}
    for k, each in results["lengths"].items():
        assert each["break_even"] == formula.break_even(int(k), each["c"], each["v"])
        assert each["predicted_speedup"] == formula.speedup(results["acceptance"], int(k), each["c"], each["v"])
    assert f"**Bound by {results['bound']}.**" in capsys.readouterr().out


# ---- llama.cpp ----


def test_query_and_key_rows_are_ordered_for_a_rotation_of_neighbours():
    config = tiny_config(rope_scaling=None)
    dim, heads = config.head_dim, config.num_attention_heads
    weight = torch.randn(heads * dim, config.hidden_size)
    x, position = torch.randn(config.hidden_size), 7
    cos, sin = (table[position] for table in rope_tables(config, 8))
    q = (weight @ x).view(heads, dim)
    rotated = q * cos + torch.cat((q[:, dim // 2 :], q[:, : dim // 2]), dim=1) * sin
    moved = gguf_peer._interleaved(config, "model.layers.0.self_attn.q_proj.weight", weight)
    pairs = torch.view_as_complex((moved @ x).view(heads, dim // 2, 2).contiguous())
    turned = pairs * torch.complex(cos[: dim // 2], sin[dim // 2 :])
    assert torch.allclose(turned.real, rotated[:, : dim // 2], atol=1e-5)
    assert torch.allclose(turned.imag, rotated[:, dim // 2 :], atol=1e-5)


def test_every_tensor_has_a_name_of_its_own_in_gguf():
    config = tiny_config()
    written = [gguf_peer.gguf_name(name) for name in config.tensor_shapes()]
    assert len(set(written)) == len(config.tensor_shapes()) and {"output.weight", "blk.1.ffn_up.weight"} <= set(written)


def test_batch_compares_texts_by_number_and_by_load(tmp_path, pair, capsys, monkeypatch):
    argv = [
        "batch",
        *pair,
        *"--sequences 1,3 --new-tokens 8 --repeats 2 --requests 5 --loads 0.5,2 --dtype fp32".split(),
    ]
    code, results = run(tmp_path, *argv)
    assert code == 0 and list(results["sequences"]) == ["1", "3"] and list(results["arrivals"]) == ["0.5", "2"]
    for n, each in results["sequences"].items():
        assert each["texts_equal"] == each["texts"] == 2 * int(n)
        assert each["plain"]["mean_draft_length"] == 0.0 and len(each["speedup"]["values"]) == 2
        for name in ("plain", "speculative"):
            assert 0 < each[name]["wait_ms"]["p50"] <= each[name]["wait_ms"]["p95"]
            assert each[name]["tok_s"]["median"] > 0
    for each in results["arrivals"].values():
        assert {each[name]["requests"] for name in each} == {5}
        assert all(each[name]["ttft_ms"]["p50"] > 0 and each[name]["tok_s"]["p5"] > 0 for name in each)
    assert not results["forced"] and results["settings"]["new_tokens"] == 8
    printed = capsys.readouterr().out
    assert "| 3 " in printed and "Forced" not in printed
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "| 3 " in tables.batch("results") and "| 0.5 " in tables.batch_arrivals("results")


def test_batch_drafts_with_a_head(tmp_path, capsys):
    """The one that belongs to a target with a name, as SmolLM2's does."""
    flags = "--sequences 2 --new-tokens 16 --repeats 1 --loads 0 --dtype fp32 --num-draft-tokens 3".split()
    code, results = run(tmp_path, "batch", "--target", "tiny", "--drafter", "head", *flags)
    each = results["sequences"]["2"]
    assert code == 0 and results["drafter"] == "draft head" and each["texts_equal"] == 2
    assert each["speculative"]["mean_draft_length"] > 1 and each["speculative"]["acceptance_rate"] > 0


def test_forced_acceptance_is_what_was_asked_for_and_is_named(tmp_path, pair, capsys):
    argv = ["batch", *pair[:2], *"--sequences 2 --new-tokens 30 --repeats 1 --loads 0 --dtype fp32".split()]
    code, results = run(tmp_path, *argv, "--force-acceptance", "1", "--num-draft-tokens", "3")
    each = results["sequences"]["2"]
    assert code == 0 and results["forced"] and "forced" in results["drafter"] and results["arrivals"] == {}
    assert each["speculative"]["acceptance_rate"] == 1.0 and each["texts_equal"] == 2
    assert "**Forced:**" in capsys.readouterr().out


@pytest.mark.parametrize("suite", ["compare", "batch"])
def test_a_drafter_that_fails_ends_a_benchmark_and_is_not_timed_as_one(pair, suite, monkeypatch, capsys):
    def broken(self, tokens, limit):
        raise ZeroDivisionError("a drafter of mine")

    name = "prompt-lookup"
    flags = {
        "compare": f"--drafters {name} --auto-drafter {name} --lengths 1 --categories short-output".split() + SMALL,
        "batch": f"--drafter {name} --sequences 2 --new-tokens 8 --repeats 1 --loads 0".split(),
    }
    monkeypatch.setattr(PromptLookup, "propose", broken)
    assert run_command(lambda: benchmark.command([suite, *pair[:2], *flags[suite], "--quiet"])) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "a drafter of mine" in errors[0]


# ---- interruption ----

SHORT = {
    "compare": "--categories short-output,editing --drafters model --auto-drafter model --lengths 1 --other-lengths 1",
    "sweep": "--longest 1",
    "bottleneck": "",
}


@pytest.mark.parametrize("suite", list(SHORT))
@pytest.mark.parametrize("early", [True, False])
def test_ctrl_c_writes_what_was_complete(tmp_path, pair, monkeypatch, capsys, suite, early):
    steps, step = [], MeasuringBar.step

    def interrupting(bar, what=""):
        steps.append(what)
        if early or len(steps) > {"compare": 50, "sweep": 9, "bottleneck": 53}[suite]:
            raise KeyboardInterrupt
        step(bar, what)

    monkeypatch.setattr(MeasuringBar, "step", interrupting)
    argv = [suite, *pair, *SHORT[suite].split(), "--max-prompts", "2", "--max-new-tokens", "4", "--repeats", "3"]
    code, results = run(tmp_path, *argv)
    assert code == INTERRUPTED and results["interrupted"]
    assert "**Interrupted:**" in capsys.readouterr().out
    complete = {
        "compare": lambda: {name: each["repetitions"] for name, each in results["categories"].items()},
        "sweep": lambda: len(results["plain"]["speedup"]["values"]) if results["plain"] else 0,
        "bottleneck": lambda: results["bound"] is not None,
    }[suite]()
    expected = {"compare": {"editing": 2, "short-output": 1}, "sweep": 1, "bottleneck": True}[suite]
    assert complete == (expected if not early else {"compare": {}, "sweep": 0, "bottleneck": False}[suite])


def test_ctrl_c_in_verify_cost_and_peers_keeps_complete_repetitions(tmp_path, monkeypatch, pair):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(NAMED_SIZES, "llama-x-small", tiny_config(dtype="bfloat16"))
    counted = []

    def interrupting(bar, what=""):
        counted.append(what)
        if what.endswith("repetition 2 of 3"):
            raise KeyboardInterrupt

    monkeypatch.setattr(MeasuringBar, "step", interrupting)
    _, results = run(tmp_path, *"verify-cost small --rows 1,3 --contexts 16 --repeats 3".split())
    cells = results["models"]["small"]["ms"]["any rows"]["16"]
    assert results["interrupted"] and sorted(len(cell["values"]) for cell in cells.values()) in ([1, 1], [1, 2])
    argv = ["peers", *pair, "--peers", "transformers", "--max-new-tokens", "4", "--max-prompts", "1", "--repeats", "3"]
    _, results = run(tmp_path, *argv)
    assert results["interrupted"] and {
        len(configuration["tok_s"]["values"]) for configuration in results["ways"].values()
    } == {1}


# ---- refusals ----


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "the following arguments are required: SUITE"),
        ("compete", "invalid choice: 'compete'"),
        ("compare --repeats 0", "argument --repeats: 0 is out of range: give a whole number at least 1"),
        ("sweep --repeats -3", "argument --repeats: -3 is out of range"),
        ("compare --categories poems", "'poems' is not known: choose from code-completion"),
        ("compare --drafters oracle", "'oracle' is not known: choose from model"),
        ("compare --lengths 2,40", "40 is out of range"),
        ("compare --lengths 9", "a draft length of 9 is more than the 7 fixed rows"),
        ("compare --drafter model", "--drafter has no meaning in the suite compare"),
        ("compare --num-draft-tokens=4", "--num-draft-tokens has no meaning in the suite compare"),
        ("compare --temperature -1", "temperature"),
        ("compare --nonsense", "unrecognized arguments: --nonsense"),
        ("compare --device tt", "--device tt: the suite compare measures on cpu and cuda"),
        ("compare --target ./no/such", "no such directory: ./no/such"),
        ("compare --json /nowhere/at/all.json", "cannot write --json /nowhere/at/all.json"),
        ("sweep --png /nowhere/at/all.png", "cannot write --png /nowhere/at/all.png"),
        ("peers --markdown /nowhere/at/all.md", "cannot write --markdown /nowhere/at/all.md"),
        ("sweep --longest 32", "32 is out of range"),
        ("sweep --longest 9 --row-invariant", "--row-invariant computes 7 rows: give --longest 6"),
        ("sweep --drafter none", "--drafter none drafts nothing"),
        ("sweep --html page.html", "--html has no meaning in the suite sweep"),
        ("verify-cost 5b", "no Llama size is called '5b'"),
        ("verify-cost ./no/such/dir", "no such directory: ./no/such/dir"),
        ("verify-cost 1b --rows 1,x", "'x' is not a whole number"),
        ("verify-cost 1b --rows 1,40", "40 is out of range"),
        ("verify-cost 1b --contexts 200000", "more than the context of 1b"),
        ("verify-cost 1b --target x", "--target is unknown to the suite verify-cost"),
        ("peers --temperature 0.7", "--temperature has no meaning in the suite peers"),
        ("peers --draft-dtype int8", "--draft-dtype has no meaning in the suite peers"),
        ("peers --dtype int8", "--dtype int8 has no meaning in the suite peers"),
        ("peers --peers vllm", "'vllm' is not known: choose from transformers, llama.cpp, openvino"),
        ("peers --num-draft-tokens 32", "32 is out of range"),
        ("peers --device tt", "--device tt: the suite peers measures on cpu and cuda"),
        ("bottleneck --context 0", "0 is out of range"),
        ("batch --sequences 0,2", "0 is out of range"),
        ("batch --loads -1", "are not loads"),
        ("batch --force-acceptance 1.5", "forced acceptance 1.5: give a chance"),
        ("batch --force-acceptance 0.5 --temperature 0.8", "repeats a greedy text"),
        ("batch --force-acceptance 0.5 --drafter model", "--force-acceptance has no meaning with --drafter model"),
        ("bottleneck --context 4000", "--context 4000 is more than 2041"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv, message, capsys):
    assert run_command(lambda: benchmark.command(argv.split())) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_a_size_that_does_not_fit_alone_is_refused(monkeypatch):
    monkeypatch.setattr(hardware, "available_bytes", lambda: 10**6)
    monkeypatch.setattr(hardware, "read_bandwidth", lambda: 1e10)
    with pytest.raises(UserError, match="no model fits into memory"):
        benchmark.command("verify-cost 1b --contexts 16 --quiet".split())


def test_help_of_every_suite_names_its_flags(capsys):
    for suite, chosen in benchmark.SUITES.items():
        with pytest.raises(SystemExit):
            benchmark.command([suite, "--help"])
        text = capsys.readouterr().out
        assert "--repeats" in text and f"({chosen.repeats})" in text and "--markdown" in text
