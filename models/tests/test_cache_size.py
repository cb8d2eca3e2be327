"""How large the caches are made: what is asked for, what fits into the memory that is free, and what is refused."""

import re
import subprocess
import sys

import pytest

import models.cache_size
from models import LLM, UserError
from models.cache_size import CachePlan, form_of
from models.loading import estimate_bytes, open_pair
from models.memory import free_bytes
from models.options import EngineOptions
from models.server.settings import parse_settings
from models.tests.llama_fixtures import tiny_config, write_tiny_checkpoint
from models.torch_llama.kv_cache import KV_BLOCK

PROMPT = "def add(a, b):"
LENGTH = 512

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def memory(monkeypatch):
    """Say how much memory is free."""

    def say(count: int | None) -> None:
        monkeypatch.setattr(models.cache_size, "free_bytes", lambda device: count)

    say(10**12)
    return say


def opened(**options):
    return open_pair(EngineOptions(**{"max_seq_len": LENGTH, "slots": 4, "free_rows": (7,), **options}))


def plan_of(**options) -> CachePlan:
    pair = opened(**options)
    draft = pair.draft.checkpoint.config if pair.draft else None
    return CachePlan(pair.options, pair.target.checkpoint.config, draft)


def numbers(error: pytest.ExceptionInfo) -> list[int]:
    return [int(number) for number in re.findall(r"\b\d+\b(?!\.)", str(error.value))]


DRAFTS = [{"drafter": "prompt-lookup"}, {"drafter": "model"}, {"drafter": "head"}]


@pytest.mark.parametrize("options", DRAFTS, ids=lambda options: options["drafter"])
def test_a_plan_is_what_loading_takes(options, memory):
    plan = plan_of(**options)
    for pool in (None, 700):
        with LLM.load(max_seq_len=LENGTH, slots=4, pool_size=pool, free_rows=(7,), **options) as llm:
            caches = [each.model.kv_cache_bytes for each in (llm.target, llm.draft) if each]
            assert llm.target.model.limits.pool == (pool or 4 * LENGTH)
        assert (
            sum(caches) <= plan.bytes(LENGTH, pool) < 1.35 * sum(caches)
        )  # of a head's cache whole blocks are counted
        weights = sum(each.model.weight_bytes for each in (llm.target, llm.draft) if each)
        assert weights == pytest.approx(plan.weights, rel=0.2)


@pytest.mark.parametrize("options", DRAFTS, ids=lambda options: options["drafter"])
def test_the_default_pool_is_what_memory_holds(options, memory):
    plan = plan_of(**options)
    whole = plan.weights + plan.needs(LENGTH)
    memory(2 * whole)
    assert opened(**options).pool is None
    memory(whole)  # nothing would be left to work with
    pool = opened(**options).pool
    assert LENGTH <= pool < 4 * LENGTH
    assert plan.weights + plan.needs(LENGTH, pool) <= whole * 0.9 or pool == LENGTH
    memory(plan.weights + plan.needs(LENGTH, LENGTH))
    assert opened(**options).pool == LENGTH
    memory(None)
    assert opened(**options).pool is None


@pytest.mark.parametrize("options", DRAFTS, ids=lambda options: options["drafter"])
def test_a_context_that_memory_cannot_hold_is_refused_with_the_longest_that_fits(options, memory):
    plan = plan_of(**options)
    memory(plan.weights + plan.needs(300, 300) + 7)
    with pytest.raises(UserError, match="max_seq_len 512 needs") as error:
        opened(**options)
    fits = next(number for number in numbers(error)[1:] if number >= 300)
    assert opened(**options, **{"max_seq_len": fits}).pool == fits
    with pytest.raises(UserError, match=f"lower max_seq_len to {fits}"):
        opened(**{**options, "max_seq_len": fits + 1})
    memory(plan.weights - 1)
    with pytest.raises(UserError, match="use a smaller model"):
        opened(**options)


def test_a_pool_that_makes_no_sense_is_refused(memory):
    assert opened(pool_size=LENGTH).pool == LENGTH
    assert opened(pool_size=10**6).pool is None
    with pytest.raises(UserError, match="pool_size 511 cannot hold one text of max_seq_len 512"):
        opened(pool_size=LENGTH - 1)
    with pytest.raises(UserError, match="pool_size 0"):
        opened(pool_size=0)
    assert EngineOptions(device="tt", pool_size=4096).pool_size == 4096
    plan = plan_of()
    memory(plan.weights + plan.needs(LENGTH, 1000))
    with pytest.raises(UserError, match="pool_size 1900 needs") as error:
        opened(pool_size=1900)
    fits = int(re.search(r"lower it to (\d+)", str(error.value))[1])
    assert 1000 <= fits < 1000 + KV_BLOCK and opened(pool_size=fits).pool == fits
    with pytest.raises(UserError, match=f"lower it to {fits}"):
        opened(pool_size=fits + 1)


def test_texts_in_a_small_pool_wait_and_are_those_written_alone(memory):
    """Whatever they share: the draft's cache is never full."""
    prompts = [PROMPT * 40 + end for end in ("\n    ret", "\n    if", "\n    x =", "")]
    options = {"max_seq_len": LENGTH, "drafter": "model", "num_draft_tokens": 3}
    with LLM.load(**options, reuse=False) as alone:
        expected = [alone.generate(prompt, max_new_tokens=16).token_ids for prompt in prompts]
        tokens = len(alone.encode(prompts[0]))
    assert 200 < tokens < LENGTH - 50
    with LLM.load(**options, slots=4, pool_size=LENGTH) as llm:
        first = llm.generate(prompts[0], max_new_tokens=16)  # the others find its beginning
        sequences = [llm.engine.add(llm.request(prompt, max_new_tokens=16)[0]) for prompt in prompts]
        together = 0
        while not llm.engine.idle:
            llm.engine.step()
            together = max(together, len(llm.engine.running))
            assert llm.target.model.cache.usage.live <= llm.target.model.kv_cache_bytes
        assert all(each.error is None for each in sequences)
    assert first.token_ids == expected[0]
    assert [each.tokens[len(each.request.prompt) :] for each in sequences] == expected
    assert 1 < together < 4  # more than the pool holds one by one, fewer than all
    assert sum(each.stats.acceptance_rate > 0 for each in sequences) == 4


def test_the_servers_command_line_has_the_option():
    assert parse_settings(["--pool-size", "4096"], {}).engine.pool_size == 4096
    assert parse_settings(["--pool-size", "4096", "--device", "tt"], {}).engine.pool_size == 4096


def test_what_is_left_of_a_containers_limit_counts_as_free(tmp_path):
    machine = free_bytes(cgroup=tmp_path)
    assert machine is None or machine > 0
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 600000\ninactive_file 100000\nactive_file 50000\n")
    assert free_bytes(cgroup=tmp_path) == (None if machine is None else 250000)
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(cgroup=tmp_path) == pytest.approx(machine, rel=0.2)


UNLIMITED = 9223372036854771712  # what version 1 says where there is no limit


@pytest.mark.parametrize(("limit", "above"), [(1000000, UNLIMITED), (UNLIMITED, 1000000), (1000000, None)])
def test_limits_of_version_1_of_cgroups_are_read(tmp_path, limit, above):
    """The container's own, or that of a group around it."""
    machine, folder = free_bytes(cgroup=tmp_path), tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text("900000\n")
    stat = "inactive_file 1\nactive_file 1\ntotal_inactive_file 100000\ntotal_active_file 50000\n"
    (folder / "memory.stat").write_text(stat + ("" if above is None else f"hierarchical_memory_limit {above}\n"))
    assert free_bytes(cgroup=tmp_path) == 250000
    (folder / "memory.usage_in_bytes").write_text("2000000\n")
    assert free_bytes(cgroup=tmp_path) == 0
    (folder / "memory.limit_in_bytes").write_text(f"{UNLIMITED}\n")
    (folder / "memory.stat").write_text(f"hierarchical_memory_limit {UNLIMITED}\n")
    assert free_bytes(cgroup=tmp_path) == (None if machine is None else pytest.approx(machine, rel=0.2))


@pytest.mark.parametrize(("drafter", "length"), [("head", 480), ("model", 481)])
def test_what_is_announced_of_one_text_is_in_whole_pages(drafter, length, memory):
    pair = opened(drafter=drafter, max_seq_len=length, slots=1, dtype="fp32", draft_dtype="fp32")
    with LLM(pair) as llm:
        for model, given, dtype in (
            (llm.target, pair.target, llm.options.dtype),
            (llm.draft, pair.draft, llm.options.draft_dtype),
        ):
            assert estimate_bytes(given, dtype, length, form_of(llm.options)).pages == model.model.kv_cache_bytes


PEAK = """
import gc, re, sys
from pathlib import Path
from models import LLM
from models.cache_size import CachePlan
from models.speculative.model import Rows

for slots in (1, 1, 11):  # the first two prepare kernels and the allocator
    options = {"max_seq_len": 2016, "slots": slots, "drafter": "none", "dtype": "fp32", "threads": 1}
    with LLM.load(sys.argv[1], **options) as llm:
        model, plan = llm.target.model, CachePlan(llm.options, llm.target.model.config, None)
        for slot in range(slots):
            model.reserve(slot, (), 2016)
            model.extend([Rows(slot, [3 + slot] * 2016, 0, last=True)])
        peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())  # ru_maxrss may be the parent's
        print(plan.bytes(2016), 1024 * int(peak[1]))
    del llm, model
    gc.collect()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_grows_as_announced(tmp_path):
    """From one text of 2016 tokens to eleven, as the kernel counts it."""
    shape = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 256}
    write_tiny_checkpoint(tmp_path, tiny_config(num_hidden_layers=1, max_position_embeddings=2048, **shape))
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    _, (one, before), (all_, after) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert all_ - one > 300e6
    assert after - before == pytest.approx(all_ - one, rel=0.05)
