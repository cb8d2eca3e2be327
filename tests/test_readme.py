"""The README: short, and its example runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_it_is_short_and_narrow():
    lines = README.splitlines()
    assert len(lines) <= 150
    wide = [line for line in lines if len(line) > 100 and not line.startswith(("`scripts/benchmark.py",))]
    assert not wide


def test_its_example_runs(tmp_path):
    (example,) = blocks(README)
    threads = os.environ.get("OMP_NUM_THREADS", "1")  # other tests run beside it
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads}
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    streamed, sampled = re.split(r"\n\d+% of drafted tokens accepted\n", done.stdout)
    assert streamed.strip() and sampled.strip()
    assert re.search(r" (length|stop)\n$", done.stdout)


def test_the_examples_of_the_api_are_python():
    for example in blocks((ROOT / "docs" / "api.md").read_text(encoding="utf-8")):
        compile(example, "docs/api.md", "exec")


def test_every_page_of_the_docs_is_reached_from_the_readme():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert pages == set(re.findall(r"\]\(docs/([\w-]+\.md)\)", README))
