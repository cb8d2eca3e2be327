"""What every endpoint needs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fastapi import Request

from models.server.engine_thread import EngineThread
from models.server.errors import ApiError
from models.server.metrics import Metrics


@dataclass(frozen=True)
class Context:
    """The parts of a server.

    Args:
        model: the served model's name.
        started: seconds since 1970.
    """

    model: str
    engine: EngineThread
    metrics: Metrics
    started: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None) -> None:
        """Raise ApiError for a model that is not served; None stands for the one that is."""
        if name is not None and name != self.model:
            message = f"there is no model {name[:80]!r}: this server has {self.model!r}"
            raise ApiError(404, message, param="model", code="model_not_found")


def context_of(request: Request) -> Context:
    """The context of the application that a request came to."""
    return request.app.state.context
