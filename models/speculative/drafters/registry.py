"""Every drafter there is, a row each: its name, what it needs, how it is made, words for reports.

Nothing else knows drafters by name: options, command lines, boards and reports ask this table. A new drafter is a file
in this folder and a row here, or a call of `register`. Quick to import: what makes a drafter is imported when one is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from models.errors import UserError
from models.speculative.model import Chains, DraftHead, EarlyExit, Trees, Workload

if TYPE_CHECKING:
    from models.speculative.drafters import Drafter, SequenceDrafter
    from models.speculative.model import FusedRounds, HeadModel, LanguageModel, SequenceModel
    from models.speculative.sampling import SamplingParams

NONE = "none"  # the name for no drafter: plain decoding
FORCED = "forced"  # acceptance by decree: see `drafters.forced`


@dataclass(frozen=True)
class Source:
    """Where drafted tokens come from; a drafter may have several, with costs and acceptance of their own.

    Args:
        label: in a table.
        words: in a sentence.
        reads_prompt: whether it has to read the prompt, and later what others have drafted, before it can draft.
    """

    label: str
    words: str
    reads_prompt: bool = False


@dataclass(frozen=True)
class Parts:
    """What a drafter is made of.

    Args:
        target, draft: models with a slot for every sequence; draft is a draft model, a draft head, or None.
        sampling: of the sequence.
        slot: of the sequence.
        rounds: greedy rounds as one program, where they can be used for this sequence.
        confident: whether probabilities are cheap to get, so that a model may stop drafting by its own.
        settings: the drafter's own options by name, such as tree_nodes and exit_layer.
    """

    target: LanguageModel
    draft: LanguageModel | None
    sampling: SamplingParams
    slot: int
    rounds: FusedRounds | None = None
    confident: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DrafterSpec:
    """A row of the table.

    Args:
        name: as options and command lines spell it.
        label: in a heading; a format string over the drafter's settings.
        help: who drafts, in half a sentence.
        make: a drafter for one sequence; the engine's `Drafter` is made of them.
        sources: of its drafts, by the name that `Draft.source` has.
        workload: what it asks the models for.
        settings: names of the options that are its own, of `options.DraftOptions`.
        when: it is the one to use, as half a sentence.
        drafter: makes the engine's `Drafter` itself, in place of `make`; for drafters that draft in step.
        listed: whether it is one to choose from; else it has to be asked for by name.
    """

    name: str
    label: str
    help: str
    make: Callable[[Parts], SequenceDrafter]
    sources: Mapping[str, Source]
    workload: Workload = Workload()
    settings: tuple[str, ...] = ()
    when: str = ""
    drafter: Callable[[Callable[[Any], Parts]], Drafter] | None = None
    listed: bool = True

    @property
    def needs_draft_model(self) -> bool:
        """Whether a draft model, or a draft head, has to be loaded."""
        return self.workload.drafts_with in ("draft", "head")

    @property
    def needs_head(self) -> bool:
        """Whether nothing but a draft head will do."""
        return self.workload.drafts_with == "head"


_TABLE: dict[str, DrafterSpec] = {}
_SOURCES: dict[str, Source] = {}


def register(spec: DrafterSpec) -> DrafterSpec:
    """Add a drafter to the table, in place of one of the same name."""
    _TABLE[spec.name] = spec
    _SOURCES.update(spec.sources)
    return spec


def unregister(name: str) -> None:
    """Take a drafter out of the table."""
    del _TABLE[name]


def names() -> list[str]:
    """Of all listed drafters in the order of the table, and NONE."""
    return [*(spec.name for spec in specs()), NONE]


def specs() -> list[DrafterSpec]:
    """All rows that are listed."""
    return [spec for spec in _TABLE.values() if spec.listed]


def spec_of(name: str) -> DrafterSpec:
    """The row of this name. Raises UserError for any other, with the names there are."""
    if name not in _TABLE:
        raise UserError(f"drafter {name!r}: choose one of {', '.join(names())}")
    return _TABLE[name]


def drafts_trees(name: str) -> bool:
    """Whether the drafter of this name drafts trees; False for a name that is not in the table."""
    return name in _TABLE and _TABLE[name].workload.tree


def source_of(name: str) -> Source:
    """What is known of a source of drafts; one that no row names speaks for itself."""
    return _SOURCES.get(name) or Source(name, name)


def reads_prompt(source: str) -> bool:
    """Whether this source of drafts has to read the prompt before it can draft."""
    known = _SOURCES.get(source)
    return known is not None and known.reads_prompt


# ------------------------------------------------------------------------------------------------------------ the table
def _model(parts: Parts) -> SequenceDrafter:
    from models.speculative.drafters.model import ModelDrafter

    model = _draft_of(parts)
    if isinstance(model, DraftHead):
        raise UserError("the draft is a head, not a model: draft with the drafter 'head'")
    if not isinstance(model, Chains):
        raise UserError(f"{type(model).__name__} cannot chain tokens: draft with prompt-lookup")
    return ModelDrafter(model, parts.sampling, confident=parts.confident, rounds=parts.rounds)


def _head(parts: Parts) -> SequenceDrafter:
    from models.speculative.drafters.draft_head import HeadDrafter

    model = _draft_of(parts)
    if not isinstance(model, DraftHead):
        raise UserError("the draft is a model, not a head: draft with the drafter 'model', or load a head")
    return HeadDrafter(cast("HeadModel", model), parts.sampling, confident=parts.confident, rounds=parts.rounds)


def _lookup(parts: Parts) -> SequenceDrafter:
    from models.speculative.drafters.prompt_lookup import PromptLookup

    return PromptLookup()


def _combined(parts: Parts) -> SequenceDrafter:
    from models.speculative.drafters.combined import Combined

    drafts = _head if isinstance(_draft_of(parts), DraftHead) else _model
    return Combined(_lookup(parts), drafts(parts))


def _tree(parts: Parts) -> SequenceDrafter:
    from models.speculative.drafters.tree import TreeDrafter

    model = _draft_of(parts)
    if not (isinstance(model, Trees) and isinstance(model, Chains)):
        raise UserError(f"{type(model).__name__} computes no trees: draft with the drafter 'model'")
    nodes = parts.settings["tree_nodes"]
    if isinstance(model, DraftHead):
        from models.speculative.drafters.draft_head import HeadTreeDrafter

        return HeadTreeDrafter(cast("HeadModel", model), parts.sampling, nodes)
    return TreeDrafter(model, parts.sampling, nodes)


def _early_exit(parts: Parts) -> SequenceDrafter:
    from models.speculative.drafters import early_exit

    target = parts.target.slot(parts.slot)
    if not isinstance(target, EarlyExit):
        raise UserError(f"{type(target).__name__} cannot be left early: draft with prompt-lookup")
    layer = parts.settings["exit_layer"]
    return early_exit.EarlyExit(target, layer, parts.sampling, confident=parts.confident, rounds=parts.rounds)


def _forced(parts: Parts) -> SequenceDrafter:
    from models.speculative.drafters.forced import ForcedDrafter

    if not parts.sampling.greedy:
        raise UserError("forced acceptance repeats a greedy text: leave out the temperature")
    settings, vocabulary = parts.settings, parts.target.limits.vocabulary
    return ForcedDrafter(
        settings["recorded"], settings["prompt_tokens"], settings["force_acceptance"], vocabulary, parts.sampling.seed
    )


def _draft_of(parts: Parts) -> SequenceModel:
    if parts.draft is None:
        raise UserError("this drafter needs a draft model, and none is loaded: load one, or draft with prompt-lookup")
    return parts.draft.slot(parts.slot)


_MODEL = {"model": Source("model", "the draft model", reads_prompt=True)}
_HEAD = {"head": Source("head", "the draft head", reads_prompt=True)}
_LOOKUP = {
    "lookup": Source("lookup", "prompt lookup"),
    "lookup-short": Source("lookup, short match", "prompt lookup after a short match"),
}

register(
    DrafterSpec(
        "model",
        "draft model",
        "the draft model",
        _model,
        _MODEL,
        Workload("draft", fusible=True),
        when="the text is new",
    )
)
register(
    DrafterSpec(
        "head",
        "draft head",
        "a draft head, one layer that reads the target's hidden states",
        _head,
        _HEAD,
        Workload("head", fusible=True),
        when="there is a head for the target",
    )
)
register(
    DrafterSpec(
        "prompt-lookup",
        "prompt lookup",
        "no model, a copy of what followed the same tokens earlier in the prompt or text",
        _lookup,
        _LOOKUP,
        when="the answer repeats its prompt, or no draft model fits",
    )
)
register(
    DrafterSpec(
        "combined",
        "prompt lookup or draft model",
        "prompt-lookup where it finds something and promises more, else the draft model or head",
        _combined,
        _LOOKUP | _MODEL | _HEAD,
        Workload("draft", fusible=True, mixed=True),
        when="texts are mixed",
    )
)
register(
    DrafterSpec(
        "tree",
        "tree of up to {tree_nodes} token",
        "the draft model or head, several guesses for a place at once",
        _tree,
        {"tree": Source("tree", "the draft model as a tree", reads_prompt=True)},
        Workload("draft", tree=True),
        settings=("tree_nodes",),
        when="the draft is unsure, and rows are cheap",
    )
)
register(
    DrafterSpec(
        "early-exit",
        "early exit after layer {exit_layer}",
        "the target's own first layers, for models trained to be left early",
        _early_exit,
        {"early-exit": Source("early-exit", "early exit")},
        Workload("first-layers", fusible=True),
        settings=("exit_layer",),
        when="the target was trained to be left early",
    )
)
register(
    DrafterSpec(
        FORCED,
        "forced acceptance {force_acceptance}",
        "nobody: tokens of a recorded run, right as often as is asked for",
        _forced,
        {"forced": Source("forced", "forced acceptance")},
        settings=("force_acceptance",),
        when="costs are to be measured apart from a draft",
        listed=False,
    )
)
