"""The parts of the demos that need no run: flags, prompt files and the JSON file."""

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest

from demo.session import PROMPTS
from demo.settings import build_parser, parse_settings
from models.cli import environment, prompts
from models.cli.environment import check_writable, project_version, write_json
from models.errors import UserError
from models.options import NAMED
from models.speculative.drafters import registry

EMBEDDED_TARGET, EMBEDDED_DRAFT = NAMED["tiny"]


def given(*argv, mode=None, environ=None):
    """What was typed."""
    return parse_settings(list(argv), mode, environ or {})


def settings(*argv, **rest):
    """With defaults filled in, as for a pair that fits."""
    typed = given(*argv, **rest)
    return typed.resolved_as(typed.engine.resolved("model" if typed.device == "tt" else "combined"))


def read_prompts(settings):
    return prompts.read_prompts(settings, PROMPTS / "python.txt")


def prompts_of(path, text):
    path.write_text(text, encoding="utf-8")
    return read_prompts(settings("--prompts", str(path)))


# ------------------------------------------------------------------------------------------------------- flags
def test_every_drafter_of_the_table_is_on_the_command_line():
    for name in registry.names():
        assert given("--drafter", name).drafter == name


def test_defaults_are_the_embedded_pair_greedy_in_bf16():
    defaults = settings()
    assert (defaults.target, defaults.draft) == (str(EMBEDDED_TARGET), None)
    assert (defaults.mode, defaults.device, defaults.dtype, defaults.draft_dtype) == ("compare", "cpu", "bf16", "bf16")
    assert (defaults.drafter, defaults.num_draft_tokens, defaults.exit_layer) == ("combined", "auto", "auto")
    assert (defaults.temperature, defaults.max_new_tokens, len(read_prompts(defaults))) == (0.0, 30, 10)


def test_environment_stands_for_flags_and_a_flag_wins():
    environ = {"HF_MODEL": "from-env", "DRAFT_MODEL": "draft-from-env"}
    assert settings(environ=environ).target == "from-env"
    assert settings(environ=environ).draft == "draft-from-env"
    assert settings("--target", "flag", "--draft", "other", environ=environ).target == "flag"
    assert settings("--target", "flag", "--draft", "other", environ=environ).draft == "other"


def test_another_target_has_no_draft_unless_one_is_named():
    assert settings("--target", "somewhere").draft is None
    assert settings(environ={"HF_MODEL": "somewhere"}).draft is None


@pytest.mark.parametrize(("k", "rows"), [(0, 1), (4, 5), (6, 7), (7, None), (31, None), ("auto", 7)])
def test_fixed_rows_are_the_drafted_tokens_and_one_more(k, rows):
    assert settings("--num-draft-tokens", str(k)).fixed_rows == rows


def test_rows_are_fixed_where_that_is_free_or_asked_for():
    assert settings("--dtype", "fp32").fixed_rows is None
    assert settings("--dtype", "fp32", "--row-invariant").fixed_rows == 7
    assert settings("--dtype", "fp32", "--row-invariant", "--num-draft-tokens", "4").fixed_rows == 5
    assert settings().fixed_rows == 7
    assert settings("--num-draft-tokens", "31", "--row-invariant").fixed_rows == 32
    assert settings("--no-row-invariant").fixed_rows is None


@pytest.mark.parametrize(
    ("argv", "length"),
    [
        ("", "auto"),
        ("--device cuda", "auto"),
        ("--drafter prompt-lookup", "auto"),
        ("--drafter tree", "auto"),
        ("--drafter early-exit", "auto"),
        ("--num-draft-tokens auto", "auto"),
        ("--num-draft-tokens 3", 3),
        ("--temperature 1", "auto"),
        ("--num-draft-tokens auto --dtype fp32", "auto"),
        ("--drafter none", 0),
        ("--drafter none --num-draft-tokens 0", 0),
        ("--verification sequential", 4),
        ("--verification sequential --num-draft-tokens 6", 6),
        ("--device tt", 4),
        ("--device tt --drafter none", 0),
        ("--device tt --num-draft-tokens 3", 3),
        ("--device tt --num-draft-tokens auto", "auto"),
        ("--device tt --drafter combined", 4),
        ("--device tt --drafter early-exit --exit-layer 2", 4),
    ],
)
def test_draft_lengths_are_what_was_asked_for_and_else_automatic(argv, length):
    assert settings(*argv.split()).num_draft_tokens == length


def test_automatic_lengths_keep_within_the_rows_that_are_free():
    assert (settings().auto, settings().longest_draft) == (True, 6)
    assert settings("--dtype", "fp32").longest_draft == settings("--no-row-invariant").longest_draft == 15
    assert settings("--dtype", "fp32", "--row-invariant").longest_draft == 6
    fixed = settings("--num-draft-tokens", "9")
    assert (fixed.auto, fixed.longest_draft) == (False, 9)


@pytest.mark.parametrize(
    ("argv", "nodes", "levels", "fixed_rows"),
    [
        ("", 6, 6, 7),
        ("--dtype fp32", 15, 15, None),
        ("--no-row-invariant", 15, 15, None),
        ("--dtype fp32 --row-invariant", 6, 6, 7),
        ("--num-draft-tokens 4", 6, 4, 7),
        ("--num-draft-tokens 0", 6, 0, 1),
        ("--num-draft-tokens 10", 15, 10, None),
        ("--num-draft-tokens 20", 20, 20, None),
        ("--num-draft-tokens 10 --row-invariant", 10, 10, 11),
        ("--tree-nodes 1", 1, 1, 2),
        ("--tree-nodes 3 --num-draft-tokens 5", 3, 3, 4),
        ("--tree-nodes 6", 6, 6, 7),
        ("--tree-nodes 7", 7, 7, None),
        ("--tree-nodes 31", 31, 15, None),
        ("--tree-nodes 31 --row-invariant", 31, 6, 32),
    ],
)
def test_a_tree_has_as_many_tokens_as_are_free_to_check_or_as_was_asked_for(argv, nodes, levels, fixed_rows):
    tree = settings("--drafter", "tree", *argv.split())
    assert (tree.tree_nodes, tree.longest_draft, tree.fixed_rows) == (nodes, levels, fixed_rows)
    assert tree.verify_rows == (nodes + 1 if levels else 1)


def test_an_exit_layer_is_chosen_unless_it_is_named():
    assert settings("--drafter", "early-exit").exit_layer == "auto"
    assert settings("--drafter", "early-exit", "--exit-layer", "auto").exit_layer == "auto"
    assert settings("--drafter", "early-exit", "--exit-layer", "4").exit_layer == 4


@pytest.mark.parametrize(
    ("drafter", "drafts", "model"),
    [
        *(("model", True, True), ("combined", True, True), ("tree", True, True)),
        *(("prompt-lookup", True, False), ("early-exit", True, False), ("none", False, False)),
    ],
)
def test_a_draft_model_is_used_by_the_drafters_that_have_one(drafter, drafts, model):
    chosen = settings("--drafter", drafter)
    assert (chosen.drafts, chosen.uses_draft_model) == (drafts, model)
    chosen = settings("--drafter", drafter, mode="baseline")
    assert (chosen.drafts, chosen.uses_draft_model) == (False, False)


def test_the_baseline_demo_has_one_mode():
    assert settings(mode="baseline").paths == ("baseline",)
    with pytest.raises(UserError, match="--mode"):
        settings("--mode", "compare", mode="baseline")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--draft", "tiny"), ("--draft-dtype", "fp32"), ("--draft-precision", "lofi")),
        *(("--draft-placement", "own-chip"), ("--exit-layer", "2"), ("--force-acceptance", "0.5")),
        ("--verification", "sequential"),
    ],
)
def test_the_baseline_refuses_what_only_drafting_has_a_use_for(flag, value):
    for argv, mode in (([flag, value], "baseline"), (["--mode", "baseline", flag, value], None)):
        with pytest.raises(UserError) as caught:
            settings(*argv, mode=mode)
        message = str(caught.value)
        assert flag in message and value in message and "leave it out" in message and "\n" not in message


def test_the_baseline_takes_what_decides_how_many_rows_its_forwards_have():
    environ = {"HF_MODEL": "tiny", "DRAFT_MODEL": "somewhere"}  # for other runs
    plain = settings("--num-draft-tokens", "5", mode="baseline", environ=environ)
    assert plain.fixed_rows == settings("--num-draft-tokens", "5").fixed_rows
    tree = ("--drafter", "tree", "--tree-nodes", "6")
    assert settings(*tree, mode="baseline").fixed_rows == settings(*tree).fixed_rows == 7


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num-draft-tokens", "-1"], ["--num-draft-tokens", "-1", "0 to 31"]),
        (["--num-draft-tokens", "32"], ["32", "0 to 31"]),
        (["--num-draft-tokens", "four"], ["four", "whole number", "auto"]),
        (["--drafter", "oracle"], ["--drafter", "oracle", "prompt-lookup", "combined"]),
        (["--drafter", "none", "--num-draft-tokens", "4"], ["--num-draft-tokens 4", "--drafter none", "leave"]),
        (["--drafter", "none", "--num-draft-tokens", "auto"], ["--num-draft-tokens auto", "--drafter none"]),
        (["--drafter", "prompt-lookup", "--draft", "x"], ["--draft has", "prompt-lookup", "--drafter model"]),
        (["--drafter", "none", "--draft-dtype", "int8"], ["--draft-dtype", "--drafter none"]),
        (["--verification", "sequential", "--num-draft-tokens", "auto"], ["auto", "sequential", "number, such as 4"]),
        (["--drafter", "early-exit", "--draft", "x"], ["--draft has", "early-exit", "--drafter model"]),
        (["--drafter", "early-exit", "--draft-dtype", "int8"], ["--draft-dtype", "--drafter early-exit"]),
        (["--drafter", "tree", "--tree-nodes", "0"], ["--tree-nodes", "0 is out of range", "1 to 31"]),
        (["--drafter", "tree", "--tree-nodes", "32"], ["--tree-nodes", "32", "1 to 31"]),
        (["--drafter", "tree", "--tree-nodes", "auto"], ["--tree-nodes", "auto", "1 to 31"]),
        (["--drafter", "tree", "--exit-layer", "2"], ["--exit-layer", "--drafter tree", "--drafter early-exit"]),
        (["--drafter", "tree", "--verification", "sequential"], ["--drafter tree", "--verification sequential"]),
        (["--tree-nodes", "6"], ["--tree-nodes", "--drafter combined", "use --drafter tree"]),
        (["--drafter", "none", "--tree-nodes", "6"], ["--tree-nodes", "--drafter none", "use --drafter tree"]),
        (["--drafter", "early-exit", "--tree-nodes", "6"], ["--tree-nodes", "use --drafter tree"]),
        (["--exit-layer", "2"], ["--exit-layer", "--drafter combined", "use --drafter early-exit"]),
        (["--drafter", "combined", "--exit-layer", "auto"], ["--exit-layer", "use --drafter early-exit"]),
        (["--drafter", "early-exit", "--exit-layer", "0"], ["--exit-layer", "0", "at least 1, or auto"]),
        (["--drafter", "early-exit", "--exit-layer", "half"], ["--exit-layer", "half", "whole number", "auto"]),
        (["--device", "tt", "--drafter", "early-exit"], ["board", "one layer", "--exit-layer 4"]),
        (["--device", "tt", "--drafter", "early-exit", "--exit-layer", "auto"], ["board", "--exit-layer 4"]),
        (["--dtype", "int4"], ["--dtype", "int4", "bf16"]),
        (["--draft-dtype", "int2"], ["int2", "int8"]),
        (["--device", "tt", "--precision", "fp8"], ["--precision", "fp8", "performance"]),
        (["--device", "tt", "--draft-precision", "int8"], ["--draft-precision", "int8", "bfp4"]),
        (["--device", "tt", "--draft-placement", "host"], ["--draft-placement", "host", "own-chip"]),
        (["--device", "npu"], ["npu", "cuda"]),
        (["--max-new-tokens", "0"], ["0", "at least 1"]),
        (["--verification", "tree"], ["tree", "sequential"]),
        (["--random-prompts", "10"], ["'10'", "COUNTxLENGTH"]),
        (["--random-prompts", "0x5"], ["0x5"]),
        (["--prompt", "a", "--prompts", "b"], ["--prompts and --prompt", "one kind"]),
        (["--instruct", "--random-prompts", "1x5"], ["--instruct", "--random-prompts"]),
        (["--nonsense"], ["--nonsense"]),
        (["stray"], ["stray"]),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it(argv, words):
    with pytest.raises(UserError) as caught:
        settings(*argv)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_board_runs_in_the_precision_of_tt_transformers_with_traces_and_a_weight_cache():
    board = settings("--device", "tt")
    assert (board.precision, board.draft_precision, board.draft_placement) == ("performance", "performance", "shared")
    assert board.trace and board.weight_cache
    assert board.fixed_rows is None  # a tile has 32 rows anyway


def test_board_flags_are_taken_and_the_draft_follows_the_target_unless_named():
    board = settings("--device", "tt", "--precision", "bf16", "--no-trace", "--no-weight-cache")
    assert (board.precision, board.draft_precision, board.trace, board.weight_cache) == ("bf16", "bf16", False, False)
    board = settings("--device", "tt", "--precision", "accuracy", "--draft-precision", "bfp4")
    assert (board.precision, board.draft_precision) == ("accuracy", "bfp4")
    assert settings("--device", "tt", "--draft-placement", "own-chip").draft_placement == "own-chip"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "flag",
    [
        "--precision bf16",
        "--draft-precision bfp4",
        "--draft-placement own-chip",
        *("--trace", "--no-trace", "--weight-cache", "--no-weight-cache"),
    ],
)
def test_a_board_flag_is_refused_elsewhere_with_the_remedy(flag, device):
    with pytest.raises(UserError) as caught:
        settings("--device", device, *flag.split())
    name = flag.split()[0]
    assert str(caught.value) == f"{name} has no meaning with --device {device}: add --device tt or leave it out"


@pytest.mark.parametrize(
    ("flag", "remedy"),
    [
        ("--dtype fp32", "use --precision or"),
        ("--draft-dtype int8", "use --draft-precision or"),
        ("--row-invariant", "leave it out"),
        ("--no-row-invariant", "leave it out"),
    ],
)
def test_a_flag_of_torch_models_is_refused_on_a_board_with_the_remedy(flag, remedy):
    with pytest.raises(UserError) as caught:
        settings("--device", "tt", *flag.split())
    assert str(caught.value).startswith(f"{flag.split()[0]} has no meaning with --device tt: {remedy}")


def test_threads_of_torch_mean_something_everywhere():
    """On a board they convert weights and draw samples."""
    for device in ("cpu", "cuda", "tt"):
        assert settings("--device", device, "--threads", "3").threads == 3


@pytest.mark.parametrize("mode", [None, "baseline"])
def test_help_says_something_about_every_flag(mode):
    parser = build_parser(mode, {})
    assert all(action.help and action.help.strip() for action in parser._actions)
    text = parser.format_help()
    assert all(len(line) <= 120 for line in text.splitlines())
    assert all(name in text for name in ("HF_MODEL", "DRAFT_MODEL", "MESH_DEVICE", "TT_CACHE_PATH"))


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--help"], 0, "--tree-nodes N"),
        (["--version"], 0, f"{project_version()}\n"),
        (["--drafter", "tree", "--tree-nodes", "0"], 2, "0 is out of range"),
        (["--drafter", "early-exit", "--draft", "x"], 2, "--draft has no meaning"),
        (["--prompts", "missing.txt"], 2, "cannot read the prompt file"),
    ],
)
def test_help_and_early_errors_need_no_torch(argv, code, said):
    """Importing it takes seconds; here it cannot be imported."""
    script = f"import sys; sys.modules['torch'] = None; from demo.harness import main; sys.exit(main({argv}))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=EMBEDDED_TARGET.parents[2], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------ prompt files
def test_text_prompts_are_parted_by_dashes_and_keep_their_inner_lines(tmp_path):
    text = "def f():\n    return\n---\nends with a line end\n\n---\n    indented\n\nblank above"
    expected = ["def f():\n    return", "ends with a line end\n", "    indented\n\nblank above"]
    assert prompts_of(tmp_path / "p.txt", text) == expected
    assert prompts_of(tmp_path / "p.txt", text + "\n") == expected
    assert prompts_of(tmp_path / "p.txt", text.replace("\n", "\r\n")) == expected


def test_dashes_inside_a_line_part_nothing(tmp_path):
    text = "Title\n-----\n    ---\na --- b\n"
    assert prompts_of(tmp_path / "p.txt", text) == [text.removesuffix("\n")]


def test_json_prompts_are_strings_or_objects(tmp_path):
    assert prompts_of(tmp_path / "p.json", '["one", {"prompt": "two\\n"}]') == ["one", "two\n"]


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("p.txt", b"", "no prompt"),
        ("p.txt", b"\n---\n  \n---\n", "no prompt"),
        ("p.txt", b"\xff\xfe\x00", "UTF-8"),
        ("p.json", b"[]", "no prompt"),
        ("p.json", b"{", "not JSON"),
        ("p.json", b'{"prompt": "x"}', "not a list"),
        ("p.json", b'["x", 3]', "entry 2"),
    ],
)
def test_a_bad_prompt_file_is_named_with_its_fault(tmp_path, name, content, word):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=word) as caught:
        read_prompts(settings("--prompts", str(tmp_path / name)))
    assert name in str(caught.value)


@pytest.mark.parametrize("flags", [[], ["--instruct"]])
def test_default_prompt_files_hold_ten_different_prompts(flags):
    prompts = read_prompts(settings(*flags))
    assert len(set(prompts)) == 10


def test_max_prompts_takes_the_first():
    assert read_prompts(settings("--max-prompts", "2")) == read_prompts(settings())[:2]


# --------------------------------------------------------------------------------------------------- JSON file
def test_json_is_written_whole_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")
    results = {"text": "[1,  2]\n é", "ids": [1, 2, 3], "none": None}
    write_json(str(path), results)
    assert json.loads(path.read_text(encoding="utf-8")) == results
    assert os.listdir(tmp_path) == ["out.json"]
    with pytest.raises(TypeError):
        write_json(str(path), {"x": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == results


def test_json_destination_is_checked_without_a_trace(tmp_path):
    check_writable(str(tmp_path / "new.json"))
    assert os.listdir(tmp_path) == []
    for bad in (tmp_path, tmp_path / "missing" / "out.json"):
        with pytest.raises(UserError, match="cannot write --json"):
            check_writable(str(bad))


def test_versions_are_those_of_the_installed_packages(monkeypatch):
    installed = {environment.PROJECT: "1.2.3", "torch": "9.9"}

    def version(package):
        if package not in installed:
            raise metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(metadata, "version", version)
    found = environment.versions()
    assert (found["project"], found["torch"], found["ttnn"]) == ("1.2.3", "9.9", None)
    del installed[environment.PROJECT]
    assert project_version() == "unknown"
