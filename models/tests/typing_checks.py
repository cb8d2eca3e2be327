"""What fulfils which protocol, as assignments: not run, but verified by the type checker.

A line with an ignore says that something does not fulfil a protocol; the checker complains when it begins to.
"""

from __future__ import annotations

from models.loading import LoadedModel, Network
from models.speculative.control.policy import AutoDraftLength, AutoPolicy, Controller, DraftPolicy, FixedDraftLength
from models.speculative.drafters import Drafter, OneText, PerSequence, SequenceDrafter
from models.speculative.drafters.combined import Combined
from models.speculative.drafters.early_exit import EarlyExit as EarlyExitDrafter
from models.speculative.drafters.early_exit import MeasuredModel
from models.speculative.drafters.model import ModelDrafter
from models.speculative.drafters.prompt_lookup import PromptLookup
from models.speculative.drafters.tree import TreeDrafter
from models.speculative.model import (
    Chains,
    DraftModel,
    EarlyExit,
    FusedRounds,
    LanguageModel,
    OneSlot,
    Paged,
    SequenceModel,
    Tapped,
    TreeModel,
    Trees,
)
from models.speculative.sequence import Watcher
from models.speculative.text import TextStream
from models.torch_llama.first_layers import FirstLayers as TorchFirstLayers
from models.torch_llama.model import TorchLlama
from models.ttnn_llama.batch_model import BatchLlama, Slot
from models.ttnn_llama.model import TtnnLlama
from models.ttnn_llama.modules.first_layers import FirstLayers as TtnnFirstLayers
from models.ttnn_llama.programs.fused import FusedRound
from models.ttnn_llama.programs.head_round import HeadRound


class Networks:
    """Whole models, with all capabilities that loading and drafters rely on."""

    def __init__(self, on_torch: TorchLlama, on_board: TtnnLlama) -> None:
        self.several: list[LanguageModel] = [on_torch, on_board, OneSlot(on_torch), OneSlot(on_board)]
        self.single: list[SequenceModel] = [on_torch, on_board, self.several[0].slot(0)]
        self.chains: list[Chains] = [on_torch, on_board]
        self.trees: list[Trees] = [on_torch, on_board]
        self.early: list[EarlyExit] = [on_torch, on_board]
        self.drafts: list[DraftModel] = [on_torch, on_board]
        self.tree_drafts: list[TreeModel] = [on_torch, on_board]
        self.measured: list[MeasuredModel] = [on_torch, on_board]
        self.whole: list[Network] = [on_torch, on_board]
        self.tapped: list[Tapped] = [on_torch, on_board]


class Batches:
    """A model of several sequences, and one of its slots: chains, no trees, no early exit."""

    def __init__(self, whole: BatchLlama, slot: Slot) -> None:
        self.several: list[LanguageModel] = [whole, slot]
        self.single: list[DraftModel] = [whole, slot]
        self.network: Network = whole
        self.pool: Paged = whole
        self.no_trees: Trees = whole  # type: ignore[assignment]
        self.no_trees_in_a_slot: Trees = slot  # type: ignore[assignment]
        self.no_early_exit: EarlyExit = whole  # type: ignore[assignment]


class Loaded:
    """What loading gives, wherever it runs."""

    def __init__(self, on_torch: LoadedModel[TorchLlama], on_board: LoadedModel[TtnnLlama]) -> None:
        self.either: list[LoadedModel[Network]] = [on_torch, on_board]


class FirstLayers:
    """The first layers of a model draft chains for it, and no trees."""

    def __init__(self, on_torch: TorchFirstLayers, on_board: TtnnFirstLayers) -> None:
        self.several: list[LanguageModel] = [on_torch, on_board]
        self.drafts: list[DraftModel] = [on_torch, on_board]
        self.no_trees_on_torch: Trees = on_torch  # type: ignore[assignment]
        self.no_trees_on_board: Trees = on_board  # type: ignore[assignment]


class Drafters:
    """One object for a text, and what the engine makes of them."""

    def __init__(
        self,
        model: ModelDrafter,
        tree: TreeDrafter,
        early: EarlyExitDrafter,
        lookup: PromptLookup,
        combined: Combined,
    ) -> None:
        self.of_a_text: list[SequenceDrafter] = [model, tree, early, lookup, combined]
        self.of_an_engine: list[Drafter] = [PerSequence(lambda sequence: lookup), OneText(model)]


class Policies:
    """Who says how much is drafted."""

    def __init__(self, fixed: FixedDraftLength, auto: AutoDraftLength, of_a_text: AutoPolicy) -> None:
        self.controllers: list[Controller] = [fixed, auto]
        self.policies: list[DraftPolicy] = [fixed, auto, of_a_text]


class Others:
    """Whole rounds as one program, and who reads along."""

    def __init__(self, rounds: FusedRound, of_head: HeadRound, text: TextStream) -> None:
        self.rounds: list[FusedRounds] = [rounds, of_head]
        self.watcher: Watcher = text
