"""check_board.py and op_counts.py: small models on mock boards, in processes of their own; what they refuse."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from models.board_mock import cluster
from models.cli.command import run_command
from models.llama.config import LlamaConfig, named_config
from models.tests.head_fixtures import head_config
from models.tests.llama_fixtures import tiny_config
from models.ttnn_llama.weights.precision import tile_bytes
from scripts.board_check.question import find_config

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "check_board.py"
needs_ttnn = pytest.mark.skipif(not cluster.is_installed(), reason="ttnn is not installed")

# Prefill attention is given a grid that no board has; everything else stays as it is.
ILLEGAL = """
import runpy, sys
script = sys.argv.pop(1)
names = runpy.run_path(script)
real = names["run_checks"]

def run_checks(*arguments):
    import ttnn
    from models.ttnn_llama.modules.layout import Layout
    program = Layout.attention_program
    Layout.attention_program = lambda self, q_chunk: program(self, q_chunk) if q_chunk == 32 else (
        ttnn.SDPAProgramConfig(
            compute_with_storage_grid_size=ttnn.CoreCoord(30, 30), q_chunk_size=q_chunk, k_chunk_size=128))
    yield from real(*arguments)

names["command"].__globals__["run_checks"] = run_checks
sys.exit(names["run_command"](lambda: names["command"](None)))
"""


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look for it there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def check_board():
    return load("check_board")


@pytest.fixture(scope="module")
def op_counts():
    return load("op_counts")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory with nothing but a config.json: 8 heads, 8 KV heads."""
    path = tmp_path_factory.mktemp("small")
    config = tiny_config(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1024,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=1024,
        dtype="bfloat16",
    )
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    return path


def run(*arguments, before=(SCRIPT,)):
    command = [sys.executable, *map(str, before), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def results_of(done, file):
    assert done.stderr == "", done.stderr
    assert "TT_FATAL" not in done.stdout and "critical" not in done.stdout
    return json.loads(file.read_text())


# ------------------------------------------------------------------------------------------------------------- runs
@needs_ttnn
def test_a_legal_pair_is_run_in_all_ways_and_exits_with_0(directory, tmp_path):
    file = tmp_path / "check.json"
    models = f"--model {directory} --draft {directory} --mesh N150 --max-seq-len 256 --draft-precision bfp4"
    done = run(*models.split(), *f"--rows 1 5 32 --prompts 1 128 129 --num-draft-tokens 3 --json {file}".split())
    assert done.returncode == 0, done.stdout
    results = results_of(done, file)
    assert [check["what"] for check in results["checks"]] == [
        "target: weights and cache of 2 layers",
        "draft: weights and cache of 2 layers",
        *(f"target: prefill of {n} tokens" for n in (1, 128, 129)),
        *("target: decode", "target: verify 5 rows", "target: verify 32 rows"),
        *("target: verify a tree of 8 rows", "target: verify a tree of 32 rows"),
        "target: draft 3 tokens by the first 1 of 2 layers",
        *(f"draft: prefill of {n} tokens" for n in (1, 128, 129)),
        *("draft: decode", "draft: verify 5 rows", "draft: verify 32 rows"),
        *("draft: verify a tree of 8 rows", "draft: verify a tree of 32 rows"),
        *("draft: draft 3 tokens after 1", "draft: draft 3 tokens after 2"),
        "round of 3 drafted tokens on the device",
    ]
    assert results["legal"] and all(check["legal"] and not check["reason"] for check in results["checks"])
    lines = done.stdout.splitlines()
    assert sum(line.startswith("legal ") for line in lines) == len(results["checks"])
    assert lines[-2] == f"LEGAL: {directory} + {directory} on N150, context 256: 22 checks"
    assert "nothing about speed, about what kernels compute" in lines[-1]
    # what ttnn's allocator gave out is what was planned
    planned = sum(plan["weights"] + plan["kv_cache"] for plan in results["planned_bytes_per_chip"].values())
    kept = results["memory_in_use"]["target + draft"]["dram_kept"]
    assert planned <= kept <= 1.1 * planned
    assert all(check["l1_per_core"] > 0 for check in results["checks"][2:])
    assert all(check["dram_while_running"] > 0 for check in results["checks"][2:])


@needs_ttnn
def test_a_draft_head_is_run_in_all_ways(directory, tmp_path):
    file, config = tmp_path / "check.json", LlamaConfig.from_json(Path(directory) / "config.json")
    head = tmp_path / "head"
    head.mkdir()
    shape = head_config(config, config.vocab_size // 2)
    (head / "config.json").write_text(json.dumps(shape.to_dict()), encoding="utf-8")
    models = f"--model {directory} --draft-head {head} --mesh N150 --max-seq-len 256"
    done = run(*models.split(), *f"--rows 1 4 --prompts 1 129 --num-draft-tokens 3 --json {file}".split())
    assert done.returncode == 0, done.stdout
    results = results_of(done, file)
    assert [check["what"] for check in results["checks"] if check["what"].startswith("draft: ")] == [
        "draft: weights and cache of 1 layers",
        "draft: a prompt of 129 tokens, with the target's states",
        "draft: rows of 4 verified tokens, read",
        "draft: 3 tokens after 4 verified ones",
        "draft: logits of rows, and of a step",
        "draft: round of 3 tokens drafted by the head",
    ]
    planned = sum(plan["weights"] + plan["kv_cache"] for plan in results["planned_bytes_per_chip"].values())
    kept = results["memory_in_use"]["target + draft"]["dram_kept"]
    assert planned <= kept <= 1.1 * planned


@needs_ttnn
def test_a_draft_on_its_own_chip_is_checked_on_meshes_of_their_own(directory, tmp_path):
    file = tmp_path / "check.json"
    options = f"--model {directory} --draft {directory} --mesh N300 --rows 5 --prompts 1 --draft-placement own-chip"
    done = run(*options.split(), "--json", file)
    assert done.returncode == 0, done.stdout
    results = results_of(done, file)
    assert set(results["memory_in_use"]) == {"target", "draft"}
    for name, usage in results["memory_in_use"].items():
        planned = results["planned_bytes_per_chip"][name]
        assert 1 <= usage["dram_kept"] / (planned["weights"] + planned["kv_cache"]) <= 1.1


@needs_ttnn
def test_texts_that_share_a_pool_are_checked_with_the_pages_of_the_pool(directory, tmp_path):
    file = tmp_path / "check.json"
    models = f"--model {directory} --draft {directory} --mesh N150 --max-seq-len 256 --slots 4 --pool-size 300"
    done = run(*models.split(), *f"--rows 1 --prompts 256 --num-draft-tokens 3 --json {file}".split())
    assert done.returncode == 0, done.stdout
    results = results_of(done, file)
    planned = results["planned_bytes_per_chip"]
    pages = 4 * (256 + 32 + 96) / 128  # of a draft, which has the whole context for every text; a pool of 300 is 3
    assert planned["draft"]["kv_cache"] / planned["target"]["kv_cache"] == pages / 3
    kept = sum(plan["weights"] + plan["kv_cache"] for plan in planned.values())
    assert kept <= results["memory_in_use"]["target + draft"]["dram_kept"] <= 1.1 * kept
    together = [check["what"] for check in results["checks"] if "users" in check["what"]]
    assert together == [
        *(f"target: 3 users, {rows} rows each, in one forward" for rows in (1, 4)),
        *(f"draft: 4 users, {rows} rows each, in one forward" for rows in (1, 4)),
    ]


@needs_ttnn
def test_an_illegal_op_is_named_with_its_place_and_reason_and_the_rest_goes_on(directory, tmp_path):
    file = tmp_path / "check.json"
    options = "--mesh T3K --rows 5 --prompts 1 200".split()
    done = run(SCRIPT, *options, "--model", directory, "--json", file, before=("-c", ILLEGAL))
    assert done.returncode == 1
    results = results_of(done, file)
    legal = {check["what"]: check["legal"] for check in results["checks"]}
    assert [what for what, fine in legal.items() if not fine] == [f"target: prefill of {n} tokens" for n in (1, 200)]
    assert legal["target: verify 5 rows"] and not results["legal"]
    (line, _) = [line for line in done.stdout.splitlines() if line.startswith("NOT LEGAL  ")]
    assert "ttnn.transformer.chunked_scaled_dot_product_attention (models/ttnn_llama/modules/attention.py:" in line
    assert "Got 900 cores, expected at most 56" in line
    assert f"NOT LEGAL: {directory} on T3K, context 1024: 2 of 9 checks failed" in done.stdout


@needs_ttnn
def test_a_model_that_does_not_fit_is_refused_before_it_is_tried():
    done = run(*"--model 8B --mesh N150 --precision bf16".split())
    assert (done.returncode, done.stderr) == (1, "")
    assert "NOT LEGAL: 8B on N150, context 2048: target needs 16." in done.stdout
    assert "GB too little: use --precision accuracy" in done.stdout
    assert "\nlegal " not in done.stdout


@needs_ttnn
def test_op_counts_gives_whole_models_from_one_and_two_layers(tmp_path):
    file = tmp_path / "counts.json"
    options = f"--sizes 1B --boards N150 N300 --rows 1 32 --position 1000 --precision accuracy --markdown --json {file}"
    group = 4  # query heads for each KV head
    done = run(*options.split(), before=(ROOT / "scripts" / "op_counts.py",))
    assert done.returncode == 0, done.stderr
    entries = {(e["board"], e["rows"], e["tree"]): e for e in json.loads(file.read_text())["entries"]}
    forms = ((1, False), (32, False), (32, True))
    assert list(entries) == [(board, *form) for board in ("N150", "N300") for form in forms]
    assert [entry["layer"]["ops"] for entry in entries.values()] == [16, 16, 17, 16, 18, 19]
    one = entries["N150", 1, False]
    matrices = 2048 * (3072 + 2048 + 3 * 8192) * 16 + 2048 * 128256
    assert one["forward"]["weights"] == pytest.approx(matrices * tile_bytes("bfp8") / 1024, rel=1e-3)
    kv_cache = 16 * 2 * 8 * 64 / 1024 * tile_bytes("bfp8") * (1024 + 2 * 32)  # read to the chunk's end, and updated
    assert one["forward"]["kv_cache"] == kv_cache
    a_position = 16 * 2 * 8 * 64 / 1024 * tile_bytes("bfp8")
    tree = entries["N150", 32, True]["forward"]
    assert tree["kv_cache"] == a_position * (group * 1152 + 32 * 2 * 32)
    assert one["bound_ms"] == pytest.approx(one["dram_bytes"] / 288e9 * 1e3)
    written = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for row in ("| 1B | N300 | 32 | 18 | 6 |", "| 1B | N300 | 32 of a tree | 19 | 6 |"):
        assert any(line.startswith(row) for line in written), done.stdout
    assert "not measured" in done.stdout and "32 rows on N300." in done.stdout


# ------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "the following arguments are required: --model, --mesh"),
        ("--model 8B --mesh E75", "unknown board 'E75': use one of N150, N300, T3K (LoudBox or QuietBox), P150, "),
        ("--model nothing --mesh N150", "no such directory or size: 'nothing'"),
        ("--model . --mesh N150", "cannot read config.json"),
        ("--model 1B --mesh N150 --precision int4", "no precision is called 'int4'"),
        ("--model 1B --mesh N150 --max-seq-len 131073", "131073 is outside 7..131072"),
        ("--model {small} --mesh N150 --max-seq-len 1025", "1025 is outside 7..1024"),
        ("--model 1B --mesh N150 --rows 1 33", "--rows 33 is outside 1..32"),
        ("--model 1B --mesh N150 --rows 0", "--rows 0 is outside 1..32"),
        ("--model 1B --mesh N150 --prompts 1 2049", "--prompts 2049 is outside 1..2048"),
        ("--model 1B --mesh N150 --num-draft-tokens 32", "--num-draft-tokens 32 is outside 1..31"),
        ("--model 1B --mesh N150 --draft-placement own-chip", "name it with --draft"),
        ("--model 8B --draft 1B --mesh P150 --draft-placement own-chip", "needs 2 chips, P150 has 1"),
        ("--model 8B --draft {small} --mesh N150", "target vocabulary 128256 != draft vocabulary 2048"),
        ("--model models/checkpoints/tiny-target --mesh T3K", "cannot be split over 8 chips: use a mesh of"),
        ("--model 1B --mesh N150 --slots 2 --pool-size 99", "99 cannot hold one text of --max-seq-len 2048"),
        ("--model no/such-model --mesh N150", "cannot get config.json of no/such-model"),
        ("--model 1B --mesh N150 --json /nowhere/at/all.json", "cannot write --json /nowhere/at/all.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(check_board, directory, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(check_board.cluster, "activate", lambda board: pytest.fail("too late to refuse"))
    assert run_command(lambda: check_board.command(argv.format(small=directory).split())) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--sizes 7B", "no Llama size is called '7B'"),
        ("--boards N150 E75", "unknown board 'E75'"),
        ("--rows 33", "--rows and --trees must be within 1..32"),
        ("--trees 33", "--rows and --trees must be within 1..32"),
        ("--precision int4", "no precision is called 'int4'"),
    ],
)
def test_bad_input_to_op_counts_is_one_line_and_exit_code_2(op_counts, capsys, argv, message):
    assert run_command(lambda: op_counts.command(argv.split())) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize("name", ["1B", "llama-3.2-1b", "meta-llama/Llama-3.2-1B-Instruct", "unsloth/Llama-3.2-1B"])
def test_published_sizes_are_known_without_a_download(name):
    assert find_config(name) == named_config("1b")


def test_the_note_of_every_answer_names_what_is_not_proved(check_board):
    assert "nothing about speed" in check_board.NOTE and "what kernels compute" in check_board.NOTE
