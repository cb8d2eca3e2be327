"""What a step found. The first thing that is not as expected is a `Surprise`, which ends the run."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch


class Surprise(Exception):
    """Something came that was not expected."""

    def __init__(self, what: str, expected: str, came: str) -> None:
        super().__init__(f"{what}: expected {expected}, came {came}")
        self.what, self.expected, self.came = what, expected, came


@dataclass(frozen=True)
class Comparison:
    """Two tensors compared: Pearson's correlation of the worst row, the largest difference and the largest value."""

    what: str
    limit: str
    pcc: float | None
    largest_difference: float
    largest_value: float


@dataclass
class Record:
    """Of one step. ``left_out`` is what it shows elsewhere but not here, and why; ``texts`` is what models wrote."""

    comparisons: list[Comparison] = field(default_factory=list)
    facts: dict[str, int | float | str] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)

    def close(self, what: str, made: torch.Tensor, expected: torch.Tensor, pcc: float = 0.99) -> None:
        """Rows [n, width] that correlate with the expected ones, each by at least so much."""
        self._same_shape(what, made, expected)
        made, expected = made.double(), expected.double()
        worst = min((_pcc(mine, theirs) for mine, theirs in zip(made, expected, strict=True)), key=_nan_first)
        self._add(what, f"PCC >= {pcc}", worst, made, expected)
        if not worst >= pcc:
            raise Surprise(what, f"PCC >= {pcc} with torch in every row", f"{worst:.4f}")

    def equal(self, what: str, made: torch.Tensor, expected: torch.Tensor) -> None:
        """The same numbers, bit for bit."""
        self._same_shape(what, made, expected)
        self._add(what, "equal", None, made.double(), expected.double())
        differ = int((made != expected).sum())
        if differ:
            largest = self.comparisons[-1].largest_difference
            raise Surprise(what, "equal numbers", f"{differ} of {made.numel()} that differ, by {largest:.3g} at most")

    def below(self, what: str, made: torch.Tensor, limit: float) -> None:
        """No value as large as a limit."""
        largest = float(made.double().abs().max())
        if not largest < limit:  # NaN too
            raise Surprise(what, f"all values below {limit:g}", f"{largest:.3g}")

    def leave_out(self, what: str, why: str) -> None:
        """Note what is not shown here."""
        self.left_out.append({"what": what, "why": why})

    @property
    def summary(self) -> str:
        """The worst of what was compared, in a few words."""
        known = [each.pcc for each in self.comparisons if each.pcc is not None]
        said = [f"{len(self.comparisons)} compared"] if self.comparisons else []
        said += [f"PCC >= {min(known):.5f}"] if known else []
        said += [f"{name} {value}" for name, value in self.facts.items()]
        return ", ".join(said)

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)

    def _add(self, what: str, limit: str, pcc: float | None, made: torch.Tensor, expected: torch.Tensor) -> None:
        difference = float((made - expected).abs().max())
        self.comparisons.append(Comparison(what, limit, pcc, difference, float(made.abs().max())))

    @staticmethod
    def _same_shape(what: str, made: torch.Tensor, expected: torch.Tensor) -> None:
        if made.shape != expected.shape:
            raise Surprise(what, f"shape {list(expected.shape)}", str(list(made.shape)))


def _pcc(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def _nan_first(value: float) -> float:
    return value if value == value else float("-inf")
