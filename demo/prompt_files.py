"""The prompts of a run: from flags, or from files."""

import json
import re
from pathlib import Path

from demo.settings import Settings
from models.errors import UserError

PROMPTS = Path(__file__).resolve().parent / "prompts"


def read_prompts(settings: Settings) -> list[str]:
    """Prompt texts in order, cut to --max-prompts; none for --random-prompts. Raises UserError for a bad file."""
    if settings.random_prompts:
        return []
    if settings.prompt:
        prompts = settings.prompt
        if not all(prompt.strip() for prompt in prompts):
            raise UserError("--prompt '' is empty: give some text")
    else:
        default = PROMPTS / ("instruct.txt" if settings.instruct else "python.txt")
        prompts = _read_file(Path(settings.prompts) if settings.prompts else default)
    return prompts[: settings.max_prompts]


def _read_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"cannot read the prompt file {path}: {reason}") from error
    if path.suffix == ".json":
        prompts = _from_json(path, text)
    else:
        parts = re.split(r"^---[ \t]*\n", text.replace("\r\n", "\n") + "\n", flags=re.MULTILINE)
        # each part but the last ends with the line end that belongs to its separator; the last has the one added
        # here, and the file's own final line end is no part of the prompt either
        prompts = [part[:-1] for part in parts[:-1]] + [parts[-1].removesuffix("\n").removesuffix("\n")]
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        raise UserError(f"the prompt file {path} holds no prompt: see --help for its format")
    return prompts


def _from_json(path: Path, text: str) -> list[str]:
    try:
        items = json.loads(text)
    except ValueError as error:
        raise UserError(f"the prompt file {path} is not JSON ({error}): see --help for its format") from error
    if not isinstance(items, list):
        raise UserError(f"the prompt file {path} holds {type(items).__name__}, not a list: see --help for its format")
    prompts = [item.get("prompt") if isinstance(item, dict) else item for item in items]
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise UserError(f'entry {number} of {path} is neither a string nor an object with a "prompt" string')
    return prompts
