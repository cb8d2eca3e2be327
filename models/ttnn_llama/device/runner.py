"""Running device programs: eagerly, or as traces that are captured once and replayed.

A program is a function of persistent input buffers that returns persistent outputs. The rules that traces live by:
- a program runs once before it is captured, so that all its kernels are compiled;
- all programs' inputs exist before the first capture, and captures come one right after the other: what a trace uses
  between its ops is free memory to everyone else, so a buffer made later could be overwritten by a replay;
- outputs are read before another program runs;
- a program that is added later ends all traces, until they are captured anew;
- on several chips only one trace exists at a time: replaying two that hold collectives in turn stops the mesh (seen
  in tt-metal's gemma4 demo). `select` names it, everything else runs eagerly.
"""

from collections.abc import Callable, Hashable, Iterable
from typing import TypeAlias

import ttnn
from loguru import logger

Outputs: TypeAlias = "ttnn.Tensor | tuple[ttnn.Tensor, ...]"


class Runner:
    """The programs of one mesh. With ``trace`` False all of them run eagerly, on mock boards the only way."""

    def __init__(self, mesh_device: ttnn.MeshDevice, *, trace: bool):
        self.mesh_device = mesh_device
        self.trace = trace
        self.one_at_a_time = mesh_device.get_num_devices() > 1
        self._bodies: dict[Hashable, Callable[[], Outputs]] = {}
        self._compiled: set[Hashable] = set()
        self._traces: dict[Hashable, tuple[int, Outputs]] = {}

    def add(self, key: Hashable, body: Callable[[], Outputs]) -> None:
        """Register a program whose inputs are in place; the same key again is ignored."""
        if key in self._bodies:
            return
        self._bodies[key] = body
        if self._traces:
            logger.warning(f"a program was added after traces were captured, all run without traces now: {key}")
            self.release()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._bodies

    def is_trace(self, key: Hashable) -> bool:
        """Whether a program is replayed."""
        return key in self._traces

    def run(self, key: Hashable) -> Outputs:
        """Run a program on what its inputs hold now. Its outputs are valid until the next program runs."""
        if key in self._traces:
            trace, outputs = self._traces[key]
            ttnn.execute_trace(self.mesh_device, trace, cq_id=0, blocking=False)
            return outputs
        return self._bodies[key]()

    def compile(self, keys: Iterable[Hashable] | None = None) -> None:
        """Run programs once (default: all), so that later runs find every kernel compiled."""
        for key in self._bodies if keys is None else keys:
            self._bodies[key]()
            self._compiled.add(key)
        ttnn.synchronize_device(self.mesh_device)

    def capture(self) -> None:
        """Compile all programs and, on one chip, capture them all as traces."""
        self.compile()
        if self.trace and not self.one_at_a_time:
            for key in self._bodies:
                self._capture(key)

    def select(self, key: Hashable) -> None:
        """On several chips: make this program the one that is a trace. On one chip all are, and nothing happens."""
        if self.trace and self.one_at_a_time and key not in self._traces:
            self.release()
            if key not in self._compiled:
                self.compile([key])
            self._capture(key)

    def _capture(self, key: Hashable) -> None:
        trace = ttnn.begin_trace_capture(self.mesh_device, cq_id=0)
        try:
            outputs = self._bodies[key]()
        except BaseException:
            ttnn.end_trace_capture(self.mesh_device, trace, cq_id=0)
            ttnn.release_trace(self.mesh_device, trace)
            raise
        ttnn.end_trace_capture(self.mesh_device, trace, cq_id=0)
        self._traces[key] = (trace, outputs)

    def release(self) -> None:
        """Forget all traces; programs then run eagerly."""
        for trace, _ in self._traces.values():
            ttnn.release_trace(self.mesh_device, trace)
        self._traces.clear()
