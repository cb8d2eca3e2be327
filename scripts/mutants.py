"""Break the code in one place at a time, and see that the tests notice.

    python scripts/mutants.py                 # all of them, one after the other, on one core
    python scripts/mutants.py --only residual --only ties
    python scripts/mutants.py --json mutants.json --resume mutants.json     # go on after an interrupt

Each mutant replaces a text that occurs exactly once in a copy of the sources, then runs the tests that should catch it,
up to the first that fails. It is caught if a test fails, survives if all pass; the same tests have passed before on the
unbroken copy. The file of --json is written after each mutant. Exit code: 0 all caught, 1 one survived, 2 a mistake in
the input, or tests that fail on the unbroken copy.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.cli.command import Parser, run_command
from models.cli.environment import check_outputs, date, machine, versions, write_json
from models.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("models", "demo", "scripts", "tests", "docs", "conftest.py", "pyproject.toml", "README.md")
TIMEOUT_S = 300
CAUGHT, SURVIVED = "caught", "survived"
TOO_LONG = "(the time limit)"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One fault: in `file`, `old` becomes `new`. breaks: what that is. tests: files or nodes in the repository."""

    name: str
    breaks: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self, source: str) -> str:
        """The source with the fault. Raises UserError unless the text occurs exactly once."""
        if source.count(self.old) != 1:
            raise UserError(
                f"mutant {self.name}: its text occurs {source.count(self.old)} times in {self.file}, not once"
            )
        return source.replace(self.old, self.new)

    @property
    def digest(self) -> str:
        """Of all that decides whether it is caught, but for the sources: results of another fault do not count."""
        return hashlib.sha256(repr(dataclasses.astuple(self)[2:]).encode()).hexdigest()[:16]


ACCEPTANCE, VERIFY = "models/speculative/acceptance.py", "models/speculative/verify.py"
ENGINE, SEQUENCE = "models/speculative/engine.py", "models/speculative/sequence.py"
MODEL, TREE = "models/speculative/drafters/model.py", "models/speculative/drafters/tree.py"
HEAD, TORCH = "models/speculative/drafters/draft_head.py", "models/torch_llama/attention.py"
RULES = ("models/tests/test_acceptance.py",)
TREES = ("models/tests/test_tree_acceptance.py",)
LOOP = ("models/tests/test_generate.py", "models/tests/test_generate_sampling.py", "models/tests/test_batch.py")
NETWORK = ("models/tests/test_torch_llama.py",)
CACHE, TEXT = "models/torch_llama/kv_cache.py", "models/speculative/text.py"
TOKENIZER, SAMPLING, ANSWERS = "models/llama/tokenizer.py", "models/speculative/sampling.py", "models/server/answers.py"
TREE_ROWS = ("models/tests/test_tree_forward.py",)
PAGES = ("models/tests/test_kv_cache.py",)
BATCH = ("models/tests/test_batch.py",)
STOPS = ("models/tests/test_text.py",)
IDS = ("models/tests/test_tokenizer.py",)
SEEDS = ("models/tests/test_sampling.py",)
SERVER = ("tests/test_server_clients.py",)

MUTANTS = (
    Mutant("accept-greedy", "a greedy draft is accepted whatever it says", ACCEPTANCE, "if choice != token:", "if False:", RULES),  # noqa: E501
    Mutant(
        "accept-too-little",
        "a drafted token is kept half as often as it should be",
        ACCEPTANCE,
        "if not _uniform(generator) * float(draft_probs[token]) < float(probs[token]):",
        "if not 2 * _uniform(generator) * float(draft_probs[token]) < float(probs[token]):",
        RULES,
    ),
    Mutant("residual", "the token after a rejection is drawn from p itself", ACCEPTANCE, "rest = (p - q).clamp_(min=0)", "rest = p.clone()", RULES),  # noqa: E501
    Mutant("residual-sign", "the residual is q - p", ACCEPTANCE, "rest = (p - q).clamp_(min=0)", "rest = (q - p).clamp_(min=0)", RULES),  # noqa: E501
    Mutant("one-hot", "a deterministic draft has half its probability", ACCEPTANCE, "    row[token] = 1\n", "    row[token] = 0.5\n", RULES),  # noqa: E501
    Mutant("top-p", "the nucleus lacks the token that completes it", ACCEPTANCE, "count = 1 + np.count_nonzero(kept.cumsum", "count = np.count_nonzero(kept.cumsum", RULES),  # noqa: E501
    Mutant("top-p-likeliest", "a tiny top_p masks even the likeliest token", ACCEPTANCE, "ids, kept = ids[:count], kept[:count] / kept[:count].sum()", "ids, kept = (ids[1:], kept[1:]) if count == 1 else (ids[:count], kept[:count] / kept[:count].sum())", RULES),  # noqa: E501
    Mutant("top-k", "one token more than top_k", ACCEPTANCE, "kind=\"stable\")[:top_k]", "kind=\"stable\")[: top_k + 1]", RULES),  # noqa: E501
    Mutant("temperature", "logits are multiplied by the temperature", ACCEPTANCE, "np.divide(row, temperature, out=law)", "np.multiply(row, temperature, out=law)", RULES),  # noqa: E501
    Mutant("ties", "equally likely tokens are not ordered by id", ACCEPTANCE, "order = np.argsort(-kept, kind=\"stable\")", "order = np.argsort(kept, kind=\"stable\")[::-1]", RULES),  # noqa: E501
    Mutant("tree-greedy", "the walk down a tree reads a node's own row", ACCEPTANCE, "node, choice = kept, target_ids[kept + 1]", "node, choice = kept, target_ids[kept]", TREES),  # noqa: E501
    Mutant("tree-residual", "a rejected child changes nothing for its siblings", ACCEPTANCE, "            probs = residual(probs, draft_probs)\n", "", TREES),  # noqa: E501
    Mutant("tree-row", "sampling in a tree reads a node's own row", ACCEPTANCE, "node, probs = child, p[child + 1]", "node, probs = child, p[child]", TREES),  # noqa: E501
    Mutant("bonus-row", "tokens that are fed again shift the rows of a verification", VERIFY, "ids = result.ids[last:]", "ids = result.ids[: len(draft.tokens) + 1]", ("models/tests/test_tree.py",)),  # noqa: E501
    Mutant("re-feed", "only the last token is fed again, whatever the cache lacks", VERIFY, "again, parents = sequence.tokens[sequence.cached :], None", "again, parents = sequence.tokens[-1:], None", ("models/tests/test_tree.py",)),  # noqa: E501
    Mutant("cached", "the cache counts one token less than it holds", VERIFY, "len(sequence.tokens) + len(kept), 0.0, computed)", "len(sequence.tokens) + len(kept) - 1, 0.0, computed)", LOOP),  # noqa: E501
    Mutant("tree-parents", "the parents in a tree are one row off", VERIFY, "*(last + 1 + up for up in draft.parents)", "*(last + up for up in draft.parents)", ("models/tests/test_tree.py",)),  # noqa: E501
    Mutant("stop-token", "a stop token does not end the text", SEQUENCE, "if watched or token.id in request.stop_ids:", "if watched:", LOOP),  # noqa: E501
    Mutant("stop-string", "a stop string does not end the text", SEQUENCE, "if watched or token.id in request.stop_ids:", "if token.id in request.stop_ids:", ("models/tests/test_llm.py", "models/tests/test_text.py")),  # noqa: E501
    Mutant("behind-a-stop", "tokens behind a stop are emitted", SEQUENCE, 'block, reason = block[:sent], "stop"', 'reason = "stop"', LOOP),  # noqa: E501
    Mutant("cut-round", "a round that a stop cut counts as a whole one", ENGINE, "round_.cut = len(tokens) <= accepted or", "round_.cut =", ("models/tests/test_generate.py",)),  # noqa: E501
    Mutant("draft-cache", "the draft's cache counts a token that it never read", MODEL, "self.cached += min(accepted, self._ahead)", "self.cached += accepted", ("models/tests/test_model_drafter.py",)),  # noqa: E501
    Mutant("draft-tree-keep", "the draft keeps a tree's rows without moving them", TREE, "self.cached += self.model.keep(self.cached - 1, rows) - 1", "self.cached += len(rows) - 1", ("models/tests/test_tree.py",)),  # noqa: E501
    Mutant("head-re-feed", "a head goes on from its own guesses", HEAD, '        """Nothing to keep: rows of drafted tokens are computed again."""', "        self.cached += accepted", ("models/tests/test_shipped_heads.py", "models/tests/test_head_drafter.py")),  # noqa: E501
    Mutant("tree-mask", "a row of a tree does not see its ancestors", TORCH, "            seen[row] |= seen[parent]\n", "            pass\n", ("models/tests/test_tree_forward.py",)),  # noqa: E501
    Mutant("tree-position", "rows of a tree stand one position too far", TORCH, "stands = torch.tensor([root + depth", "stands = torch.tensor([root + 1 + depth", ("models/tests/test_tree_forward.py",)),  # noqa: E501
    Mutant("not-finite", "logits that are NaN go unnoticed", SEQUENCE, "if block[-1].id < 0:", "if False:", ("models/tests/test_not_finite.py",)),  # noqa: E501
    Mutant("causal-band", "every row sees the one behind it", TORCH, "edge.triu(1)", "edge.triu(2)", NETWORK),
    Mutant("tree-sibling", "a row of a tree sees the row before it, its sibling", TORCH, "seen[row] |= seen[parent]", "seen[row] |= seen[row - 1]", TREE_ROWS),  # noqa: E501
    Mutant("block-length", "fixed rows in two blocks read as far as the last of them", TORCH, "((1, used) if fixed else (used,))", "(used,)", NETWORK),  # noqa: E501
    Mutant("block-twice", "a run of blocks for a sequence may have an owner", CACHE, "            if owners or block in taken:", "            if block in taken:", PAGES),  # noqa: E501
    Mutant("freed-while-shared", "a block that others own is given up", CACHE, "            if self._owners[block]:\n                continue\n            self._idle += 1", "            self._idle += 1", PAGES),  # noqa: E501
    Mutant("shared-written", "a block that others own is written", CACHE, "            if self._owners[block] == 1:\n                self._forget(block)", "            if self._owners[block] >= 1:\n                self._forget(block)", PAGES),  # noqa: E501
    Mutant("chained-hash", "a block is found whatever stands before it", CACHE, "digest_size=16, key=before)", "digest_size=16)", PAGES),  # noqa: E501
    Mutant("page-offset", "positions lie one block too early in the pool", CACHE, "return self.blocks[block] * KV_BLOCK + offset", "return self.blocks[max(block - 1, 0)] * KV_BLOCK + offset", PAGES),  # noqa: E501
    Mutant("keep-place", "accepted rows of a tree move one place too far", CACHE, "table.at(position + i) for i in", "table.at(position + i + 1) for i in", TREE_ROWS),  # noqa: E501
    Mutant("wrong-owner", "results of a joint forward go to another sequence", VERIFY, "for place in range(len(rows))]", "for place in reversed(range(len(rows)))]", BATCH),  # noqa: E501
    Mutant("stop-held", "what a stop string may have begun with is not held back", TEXT, "keep = max(_begun(held, stop) for stop in self._stop)", "keep = 0", STOPS),  # noqa: E501
    Mutant("stop-first", "of two stop strings the later one ends the text", TEXT, "min(found)", "max(found)", STOPS),
    Mutant("bos-twice", "a text that spells the BOS gets a second one", TOKENIZER, "return [self.bos_id, *ids[start:]]", "return [self.bos_id, *ids]", IDS),  # noqa: E501
    Mutant("bos-unasked", "a BOS where the model's tokenizer adds none", TOKENIZER, "if not self.begins_with_bos or self.bos_id is None:", "if self.bos_id is None:", IDS),  # noqa: E501
    Mutant("seed", "the seed changes nothing", SAMPLING, 'f"{self.seed}/{stream}"', "stream", SEEDS),
    Mutant("seed-shared", "target and draft draw the same numbers", SAMPLING, 'f"{self.seed}/{stream}"', "self.seed", SEEDS),  # noqa: E501
    Mutant("usage-total", "the server's total lacks the text", ANSWERS, '"total_tokens": job.prompt_tokens + stats.tokens', '"total_tokens": job.prompt_tokens', SERVER),  # noqa: E501
    Mutant("usage-rejected", "accepted tokens count as rejected too", ANSWERS, '"rejected_prediction_tokens": drafted - accepted', '"rejected_prediction_tokens": drafted', SERVER),  # noqa: E501
)  # fmt: skip


def check() -> None:
    """Raise UserError for a mutant that does not apply to the sources as they are."""
    for mutant in MUTANTS:
        mutant.applied((ROOT / mutant.file).read_text(encoding="utf-8"))


def _pytest(tests: Sequence[str], copy: Path) -> tuple[int, list[str]]:
    """Run tests of a copy up to the first that fails: (pytest's exit code, which failed)."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=copy, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return 1, [TOO_LONG]
    lines = [line.split(" ", 1)[1] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return done.returncode, [line.split(" - ")[0] for line in lines]


def check_sound(test: str, copy: Path) -> None:
    """Raise UserError for a test that fails on the unbroken copy: it would catch anything."""
    code, failed = _pytest((test,), copy)
    if code:
        raise UserError(f"{' '.join(failed) or test} fails on the unbroken sources ({code}): mend that first")


def tried(mutant: Mutant, copy: Path) -> dict[str, Any]:
    """Run a mutant's tests in a copy of the sources, which is as before afterwards."""
    file = copy / mutant.file
    sound = file.read_text(encoding="utf-8")
    file.write_text(mutant.applied(sound), encoding="utf-8")
    began = time.perf_counter()
    try:
        code, failed = _pytest(mutant.tests, copy)
    finally:
        file.write_text(sound, encoding="utf-8")
    if code not in (0, 1):
        raise UserError(f"mutant {mutant.name}: pytest ended with {code}, not with a failed test: mend the mutant")
    return {
        "name": mutant.name,
        "file": mutant.file,
        "breaks": mutant.breaks,
        "digest": mutant.digest,
        "verdict": SURVIVED if code == 0 else CAUGHT,
        "by": failed[:1],
        "seconds": round(time.perf_counter() - began, 1),
    }


def copied(folder: Path) -> None:
    """Copy the sources into a folder."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder)


def before(path: str) -> dict[str, Any]:
    """Results by name, from a file, of those mutants that were caught and are now as they were then.

    Raises UserError for a file that holds no such results.
    """
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))["mutants"]
        found = {each["name"]: each for each in results}
        return {mutant.name: found[mutant.name] for mutant in MUTANTS if _is_of(mutant, found.get(mutant.name))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--resume: {path} holds no results of mutants ({error!r}): leave it out") from error


def _is_of(mutant: Mutant, result: dict[str, Any] | None) -> bool:
    return result is not None and result["digest"] == mutant.digest and result["verdict"] == CAUGHT


def command(argv: Sequence[str] | None = None) -> int:
    """Try the mutants: the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--only", metavar="NAME", action="append", help="only this mutant; may be given several times")
    parser.add_argument("--json", metavar="FILE", help="write what happened to this file")
    parser.add_argument(
        "--resume",
        metavar="FILE",
        action="append",
        default=[],
        help="take over what this file of --json says was caught; may be given several times",
    )
    options = parser.parse_args(argv)
    known = {mutant.name: mutant for mutant in MUTANTS}
    if unknown := [name for name in options.only or () if name not in known]:
        raise UserError(f"there is no mutant {unknown[0]!r}: choose from {', '.join(known)}")
    check_outputs({"--json": options.json})
    check()
    results = {name: result for file in options.resume for name, result in before(file).items()}
    circumstances = {"date": date(), "versions": versions(), "machine": machine("cpu"), "command": sys.argv}
    sound: set[str] = set()

    def write() -> None:
        if options.json:
            ordered = [results[each] for each in known if each in results]
            write_json(options.json, circumstances | {"mutants": ordered})

    write()
    with tempfile.TemporaryDirectory() as folder:
        copied(Path(folder))
        for name in options.only or known:
            mutant = known[name]
            if name in results:
                continue
            for test in mutant.tests:
                if test not in sound:
                    check_sound(test, Path(folder))
                    sound.add(test)
            results[name] = result = tried(mutant, Path(folder))
            print(f"{result['verdict']:<9}{name:<20}{' '.join(result['by'])}", flush=True)
            write()
    survived = [each for each in results.values() if each["verdict"] == SURVIVED]
    print(f"{len(results) - len(survived)} of {len(results)} mutants were caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: command(None)))
