"""Break the code in one place at a time, and see that the tests notice.

    python scripts/mutants.py                 # all of them, one after the other, on one core: some minutes
    python scripts/mutants.py --only residual --json mutants.json

Each mutant replaces a text that occurs exactly once in a copy of the sources, then runs the tests that should catch it.
It is caught if a test fails, survives if all pass. Exit code: 0 all caught, 1 one survived, 2 a mistake in the input.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from models.cli.command import Parser, run_command
from models.cli.environment import check_outputs, date, machine, versions, write_json
from models.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("models", "demo", "scripts", "tests", "docs", "conftest.py", "pyproject.toml", "README.md")
TIMEOUT_S = 300
CAUGHT, SURVIVED = "caught", "survived"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One fault: in `file`, `old` becomes `new`. tests: files or nodes, relative to the repository."""

    name: str
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


ACCEPTANCE, VERIFY = "models/speculative/acceptance.py", "models/speculative/verify.py"
ENGINE, SEQUENCE = "models/speculative/engine.py", "models/speculative/sequence.py"
MODEL, TREE = "models/speculative/drafters/model.py", "models/speculative/drafters/tree.py"
HEAD, TORCH = "models/speculative/drafters/draft_head.py", "models/torch_llama/attention.py"
RULES = ("models/tests/test_acceptance.py",)
TREES = ("models/tests/test_tree_acceptance.py",)
LOOP = ("models/tests/test_generate.py", "models/tests/test_generate_sampling.py", "models/tests/test_batch.py")
NETWORK = ("models/tests/test_torch_llama.py",)

MUTANTS = (
    Mutant("accept-greedy", ACCEPTANCE, "if choice != token:", "if False:", RULES),
    Mutant(
        "accept-too-little",
        ACCEPTANCE,
        "if not _uniform(generator) * float(draft_probs[token]) < float(probs[token]):",
        "if not 2 * _uniform(generator) * float(draft_probs[token]) < float(probs[token]):",
        RULES,
    ),
    Mutant("residual", ACCEPTANCE, "rest = (p - q).clamp_(min=0)", "rest = p.clone()", RULES),
    Mutant("residual-sign", ACCEPTANCE, "rest = (p - q).clamp_(min=0)", "rest = (q - p).clamp_(min=0)", RULES),
    Mutant("one-hot", ACCEPTANCE, "    row[token] = 1\n", "    row[token] = 0.5\n", RULES),
    Mutant("top-p", ACCEPTANCE, "kept.cumsum(-1) - kept >= top_p", "kept.cumsum(-1) >= top_p", RULES),
    Mutant("top-p-likeliest", ACCEPTANCE, "            masked[0] = False", "            masked[0] = masked[0]", RULES),
    Mutant("top-k", ACCEPTANCE, "n = top_k if top_k < vocab", "n = top_k + 1 if top_k < vocab", RULES),
    Mutant("temperature", ACCEPTANCE, "logits.float() / temperature", "logits.float() * temperature", RULES),
    Mutant("ties", ACCEPTANCE, "    ids = ids.sort().values\n", "", RULES),
    Mutant("tree-greedy", ACCEPTANCE, "node, choice = kept, target_ids[kept + 1]", "node, choice = kept, target_ids[kept]", TREES),  # noqa: E501
    Mutant("tree-residual", ACCEPTANCE, "            probs = residual(probs, draft_probs)\n", "", TREES),
    Mutant("tree-row", ACCEPTANCE, "node, probs = child, p[child + 1]", "node, probs = child, p[child]", TREES),
    Mutant("bonus-row", VERIFY, "ids = result.ids[last:]", "ids = result.ids[: len(draft.tokens) + 1]", LOOP),
    Mutant("re-feed", VERIFY, "again, parents = sequence.tokens[sequence.cached :], None", "again, parents = sequence.tokens[-1:], None", ("models/tests/test_tree.py",)),  # noqa: E501
    Mutant("cached", VERIFY, "len(sequence.tokens) + len(kept), 0.0, computed)", "len(sequence.tokens) + len(kept) - 1, 0.0, computed)", LOOP),  # noqa: E501
    Mutant("tree-parents", VERIFY, "*(last + 1 + up for up in draft.parents)", "*(last + up for up in draft.parents)", ("models/tests/test_tree.py",)),  # noqa: E501
    Mutant("stop-token", SEQUENCE, "if watched or token.id in request.stop_ids:", "if watched:", LOOP),
    Mutant("stop-string", SEQUENCE, "if watched or token.id in request.stop_ids:", "if token.id in request.stop_ids:", ("models/tests/test_llm.py", "models/tests/test_text.py")),  # noqa: E501
    Mutant("behind-a-stop", SEQUENCE, 'block, reason = block[:sent], "stop"', 'reason = "stop"', LOOP),
    Mutant("cut-round", ENGINE, "round_.cut = len(tokens) <= accepted or", "round_.cut =", ("models/tests/test_generate_stats.py",)),  # noqa: E501
    Mutant("draft-cache", MODEL, "self.cached += min(accepted, self._ahead)", "self.cached += accepted", ("models/tests/test_model_drafter.py",)),  # noqa: E501
    Mutant("draft-tree-keep", TREE, "self.cached += self.model.keep(self.cached - 1, rows) - 1", "self.cached += len(rows) - 1", ("models/tests/test_tree.py",)),  # noqa: E501
    Mutant("head-re-feed", HEAD, '        """Nothing to keep: rows of drafted tokens are computed again."""', "        self.cached += accepted", ("models/tests/test_head_drafter.py",)),  # noqa: E501
    Mutant("tree-mask", TORCH, "            seen[row] |= seen[parent]\n", "            pass\n", ("models/tests/test_tree_forward.py",)),  # noqa: E501
    Mutant("tree-position", TORCH, "stands = torch.tensor([root + depth", "stands = torch.tensor([root + 1 + depth", ("models/tests/test_tree_forward.py",)),  # noqa: E501
    Mutant("not-finite", SEQUENCE, "if block[-1].id < 0:", "if False:", ("models/tests/test_not_finite.py",)),
)  # fmt: skip


def check() -> None:
    """Raise UserError for a mutant that does not apply to the sources as they are."""
    for mutant in MUTANTS:
        mutant.applied((ROOT / mutant.file).read_text(encoding="utf-8"))


def tried(mutant: Mutant, copy: Path) -> dict[str, object]:
    """Run a mutant's tests in a copy of the sources, which is as before afterwards."""
    file = copy / mutant.file
    sound = file.read_text(encoding="utf-8")
    file.write_text(mutant.applied(sound), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *mutant.tests]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    began = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=copy, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S)
        failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        code = done.returncode
    except subprocess.TimeoutExpired:
        code, failed = 1, ["(the time limit)"]
    finally:
        file.write_text(sound, encoding="utf-8")
    if code not in (0, 1):
        raise UserError(f"mutant {mutant.name}: pytest ended with {code}, not with a failed test: mend the mutant")
    verdict = SURVIVED if code == 0 else CAUGHT
    seconds = round(time.perf_counter() - began, 1)
    return {"name": mutant.name, "file": mutant.file, "verdict": verdict, "by": failed[:1], "seconds": seconds}


def command(argv: Sequence[str] | None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--only", metavar="NAME", action="append", help="only this mutant; may be given several times")
    parser.add_argument("--json", metavar="FILE", help="write what happened to this file")
    options = parser.parse_args(argv)
    known = {mutant.name: mutant for mutant in MUTANTS}
    if unknown := [name for name in options.only or () if name not in known]:
        raise UserError(f"there is no mutant {unknown[0]!r}: choose from {', '.join(known)}")
    check_outputs({"--json": options.json})
    check()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, folder)
        for mutant in [known[name] for name in options.only or known]:
            results.append(tried(mutant, Path(folder)))
            print(f"{results[-1]['verdict']:<9}{mutant.name:<20}{' '.join(results[-1]['by'])}", flush=True)
    survived = [each["name"] for each in results if each["verdict"] == SURVIVED]
    print(f"{len(results) - len(survived)} of {len(results)} mutants were caught")
    if options.json:
        circumstances = {"date": date(), "versions": versions(), "machine": machine("cpu"), "command": sys.argv}
        write_json(options.json, circumstances | {"mutants": results})
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: command(None)))
