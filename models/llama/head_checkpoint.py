"""Draft heads in files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from models.llama.config import LlamaConfig
from models.llama.head_config import HeadConfig


class HeadCheckpoint(dict[str, torch.Tensor]):
    """An opened draft head: the file's tensor names to tensors."""

    def __init__(self, path: Path, config: HeadConfig, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.path, self.config = path, config

    @classmethod
    def open(cls, path: str | Path, target: LlamaConfig | None = None) -> HeadCheckpoint:
        """Open a head's directory. Raises UserError where it does not fit the target."""
        config = HeadConfig.from_json(Path(path) / "config.json", target)
        if target is not None:
            config.check_target(target)
        return cls(Path(path), config, load_file(Path(path) / "model.safetensors"))
