"""Where the project keeps what it would rather not make twice. Standard library only."""

import os
from collections.abc import Mapping
from pathlib import Path


def user_cache(name: str, environ: Mapping[str, str] = os.environ) -> Path:
    """The directory of that name in the user's cache directory; it may not exist yet."""
    caches = Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return caches / "tt-speculative-llama" / name
