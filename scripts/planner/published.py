"""Published plain decode speeds of Llama 3.x on Tenstorrent boards, one sequence, tokens/s/user: what the planner is
fitted to, and what speculation has to beat.

Every figure from 2025 on that names model, board and speed is here, with its date and source. Those that are not fitted
say why (`Point.excluded`). Not here, because they are no measurements of Llama 1B, 3B or 8B at batch 1: the theoretical
targets of tt-inference-server (8B: T3K 73, P150 37, P300x2 125 t/s/u), batches of 32, data-parallel runs, Galaxy
systems, Gemma, and an N300 figure of 2026-01 that cannot be read in its pull request.
"""

from dataclasses import dataclass, replace

from models.boards import BOARDS
from models.llama.config import LlamaConfig, named_config
from models.ttnn_llama.weights.precision import Precision, precision_named
from scripts.planner.counts import Counts, Place, Work
from scripts.planner.fit import PHASES, Chip, Observation, Step

SHORT = 228  # tokens in the cache on average: a prompt of 128, 200 decoded
SERVED = 192  # a prompt of 128, 128 decoded
LONG = 65536 + 100

# Device programs of a layer of tt_transformers beside its exchanges: its source has about 20 calls, and conversions
# between layouts that depend on the version.
LAYER_PROGRAMS = 27
LAYER_EXCHANGES = 4  # a reduce-scatter and an all-gather for each of attention and MLP, on several chips
# Cores that its attention gives to a KV head at most: sdpa_decode's own limit.
MOST_ATTENTION_CORES = 16
# The whole 8B decode as one program on P300x2 took 7.54 ms a token, as 999 programs 7.63: per layer, in us.
MERGED_US = (7.63 - 7.54) / 32 * 1000

TABLE = "tt-metal models/tt_transformers/PERF.md (040a27c)"
QB2 = "tt-metal models/demos/llama31_8b_qb2"
AUTOPORT = "tt-metal models/autoports/meta_llama_llama_3_"

HOST = (
    "slowed by its host: older software ran this model on this board more than 1.3 times as fast (tt-metal issues "
    "46214 and 48510 on unstable hosts)"
)
TEACHER = "teacher-forced: the host reads the logits of each step"
FIRST = "the time to the first token is in it"
MEAN = "a mean with the trace capture of each request in it; the median is fitted"

_CHIPS = {
    name: Chip(board.arch, board.dram_gb_per_s, board.chips, board.dram_banks, board.worker_cores)
    for name, board in BOARDS.items()
}
_CHIPS["P100"] = replace(_CHIPS["P150"], gb_per_s=448.0, banks=7)  # its data sheet: 28 GB of GDDR6
_CHIPS["2xP150"] = replace(_CHIPS["P150"], chips=2)
_CHIPS["8xP150"] = replace(_CHIPS["P150"], chips=8)
# Boards that have no counts of their own, and those whose counts stand for theirs.
_ALIKE = {"P100": "P150", "2xP150": "P300", "8xP150": "T3K"}


@dataclass(frozen=True)
class Point:
    """One published figure.

    Args:
        precision: the named one that has the same formats.
        context: tokens in the cache, on average.
        date: as exact as it is known, "2026-07-21", "2026-06" or "2026".
        fidelities: (matrices, fidelity) where they differ from the precision's; see `matrices`.
        waits: whether the host waits for each token before it starts the next step.
        served: through an inference server.
        excluded: why it is not fitted; empty where it is.
        possible: whether it can be true; nothing is compared with one that cannot.
    """

    model: str
    board: str
    precision: str
    context: int
    tok_s_user: float
    date: str
    software: str
    source: str
    fidelities: tuple[tuple[str, str], ...] = ()
    waits: bool = True
    served: bool = False
    excluded: str = ""
    possible: bool = True

    @property
    def year(self) -> int:
        return int(self.date[:4])

    @property
    def group(self) -> tuple[str, str]:
        """Points that share it are nearly the same measurement."""
        return self.model, self.board


# ---- 2025 -----------------------------------------------------------------------------------------------------------

# t/s/u by model, on N150, N300, T3K. The table calls itself deprecated and bears no date; its commit is of 2025.
_PERFORMANCE = {"1B": (87.8, 105.9, 119.8), "3B": (54.0, 68.0, 68.5), "8B": (28.3, 44.2, 64.3)}
_ACCURACY = {"1B": (84.7, 102.8, 120.5), "3B": (47.6, 63.5, 67.9), "8B": (25.2, 38.8, 60.8)}
_LONG = {"1B": (53.0, 65.2, 73.7), "3B": (25.3, 34.8, 41.0), "8B": (16.9, 26.1, 38.1)}
DEMO = "tt_transformers demo"
SERVER = "tt-inference-server, vLLM"


def _demo(model: str, board: str, rate: float, date: str, source: str, context: int = SHORT, **more) -> Point:
    precision = more.pop("precision", "performance")
    return Point(model, board, precision, context, rate, date, DEMO, source, **more)


def _served(model: str, board: str, rate: float, date: str, source: str, context: int = SERVED, **more) -> Point:
    software = more.pop("software", SERVER)
    return Point(model, board, "performance", context, rate, date, software, source, served=True, **more)


_OF_2025 = (
    *(
        _demo(model, board, rate, "2025", TABLE, context, precision=precision)
        for figures, precision, context in (
            (_PERFORMANCE, "performance", SHORT),
            (_ACCURACY, "accuracy", SHORT),
            (_LONG, "performance", LONG),
        )
        for model, rates in figures.items()
        for board, rate in zip(("N150", "N300", "T3K"), rates, strict=True)
    ),
    _demo("8B", "P100", 29.5, "2025", TABLE),
    _demo("8B", "P150", 33.6, "2025", TABLE),
    _demo("8B", "2xP150", 47.0, "2025-08", "tt-metal issue 25013"),
    _demo("8B", "8xP150", 80.0, "2025-09", "tt-metal issue 25015, the middle of 77 to 83"),
    *(
        _served(model, board, rate, date, f"tt-inference-server pull request {number}", context)
        for model, board, date, number, rates in (
            ("1B", "N150", "2025-03", 164, ((SERVED, 58.0), (SERVED, 55.5))),
            ("1B", "N150", "2025-09", 717, ((SERVED, 65.8), (1088, 56.3), (2112, 51.0))),
            ("3B", "N150", "2025-03", 165, ((SERVED, 39.3), (1088, 33.3), (2112, 27.9))),
            # The second board is not named; N300 is what its speeds fit.
            ("3B", "N300", "2025-03", 165, ((SERVED, 44.7), (1088, 40.5), (2112, 36.5))),
            ("8B", "N300", "2025-06", 312, ((SERVED, 40.4),)),
        )
        for context, rate in rates
    ),
)

# ---- 2026 -----------------------------------------------------------------------------------------------------------

_QB2_FIDELITIES = (("attention", "LoFi"), ("down", "LoFi"))
_BFP4_FIDELITIES = (("attention", "HiFi2"),)  # the autoport of 8B: attention matrices of bfp4 at HiFi2
_DOWN, _ATTENTION, _HEAD = ("down", "LoFi"), ("attention", "LoFi"), ("head", "LoFi")


def _qb2(rate: float, context: int, date: str, source: str, **more) -> Point:
    software = "llama31_8b_qb2"
    # Its next step starts from the token on the device, served or not.
    return Point(
        "8B", "P300x2", "performance", context, rate, date, software, source, _QB2_FIDELITIES, waits=False, **more
    )


_P150_2026 = "tt-metal pull request 50662, closed"
_AUTO_8B, _AUTO_1B = f"{AUTOPORT}1_8b_instruct/doc", f"{AUTOPORT}2_1b_instruct/doc"
_TTTV2 = "tt-metal pull request 49292"
_TTTV2_3B = "tt-metal pull request 50227"

_OF_2026 = (
    _qb2(1000 / 7.63, 128, "2026-09-23", f"{QB2} EXPERIMENT2_REPORT.md"),
    _qb2(1000 / 8.07, 2048, "2026-09-23", f"{QB2} EXPERIMENT2_REPORT.md"),
    _qb2(1000 / 8.68, 8192, "2026-09-23", f"{QB2} EXPERIMENT2_REPORT.md"),
    _qb2(131.1, 300, "2026-09", f"{QB2} README.md, CI", served=True),
    _qb2(127.0, SERVED, "2026-09-08", "tt-metal pull request 55922, the middle of 125.6 to 128.4", served=True),
    _qb2(125.0, 1088, "2026-09-08", "tt-metal pull request 55922", served=True),
    _qb2(123.0, 2112, "2026-09-08", "tt-metal pull request 55922", served=True),
    _qb2(116.0, 1088, "2026-09-08", "tt-metal pull request 55922", served=True, excluded=FIRST),
    _qb2(109.0, 2112, "2026-09-08", "tt-metal pull request 55922", served=True, excluded=FIRST),
    _qb2(
        1000 / 7.54,
        128,
        "2026-09-23",
        f"{QB2} EXPERIMENT2_REPORT.md",
        excluded="one program for the whole decode: what fewer programs are worth is read from it",
    ),
    _demo("8B", "P150", 38.5, "2026", "tt-metal issue 48885"),
    _demo("8B", "P150", 40.2, "2026-07-21", _P150_2026),
    _demo("8B", "P150", 40.8, "2026-07-21", f"{_P150_2026}: QKV stays sharded"),
    _demo("8B", "P150", 45.4, "2026-07-21", f"{_P150_2026}: down LoFi", fidelities=(_DOWN,)),
    _demo("8B", "P150", 49.7, "2026-07-21", f"{_P150_2026}: QKV, O LoFi", fidelities=(_DOWN, _ATTENTION)),
    _demo("8B", "P150", 51.5, "2026-07-21", f"{_P150_2026}: head LoFi", fidelities=(_DOWN, _ATTENTION, _HEAD)),
    *(
        Point(
            *("8B", "T3K", "bfp4", SERVED, rate, "2026-06-15", "autoport", f"{_AUTO_8B}/{file}", _BFP4_FIDELITIES),
            **more,
        )
        for rate, file, more in (
            (70.6, "datatype_sweep", {"waits": False}),
            (1000 / 15.75, "optimized_vllm, median", {"served": True}),
            (54.1, "optimized_vllm, mean", {"served": True, "excluded": MEAN}),
            (49.5, "datatype_sweep", {"excluded": TEACHER}),
        )
    ),
    _served("8B", "T3K", 68.1, "2026-01", "tt-inference-server pull request 1966"),
    *(
        Point("1B", "T3K", precision, SERVED, rate, "2026-06", "autoport", f"{_AUTO_1B}/{file}", **more)
        for precision, rate, file, more in (
            ("performance", 160.0, "optimized_vllm, no readback", {"waits": False}),
            ("accuracy", 146.8, "datatype_sweep", {"waits": False}),
            ("accuracy", 1000 / 7.56, "optimized_vllm, median", {"served": True}),
            ("accuracy", 115.6, "optimized_vllm, mean", {"served": True, "excluded": MEAN}),
            ("accuracy", 92.7, "datatype_sweep", {"excluded": TEACHER}),
        )
    ),
    # Old tt_transformers and its second version (TTTv2), on the machines of two pull requests
    _demo("1B", "T3K", 152.0, "2026", f"{_TTTV2}, the middle of 151 to 153.5"),
    _demo("1B", "N300", 38.0, "2026", _TTTV2, excluded=HOST),
    _demo("1B", "N150", 12.2, "2026", _TTTV2, excluded=HOST),
    _demo("1B", "N150", 79.7, "2026", f"{_TTTV2}, TTTv2"),
    _demo("1B", "N300", 70.1, "2026", f"{_TTTV2}, TTTv2", excluded=HOST),
    _demo("1B", "T3K", 22.5, "2026", f"{_TTTV2}, TTTv2", excluded=HOST),
    _demo("3B", "T3K", 80.3, "2026", _TTTV2_3B),
    _demo("3B", "N300", 31.1, "2026", _TTTV2_3B, excluded=HOST),
    _demo("3B", "N150", 11.1, "2026", _TTTV2_3B, excluded=HOST),
    _demo("3B", "N150", 49.9, "2026", f"{_TTTV2_3B}, TTTv2"),
    _demo("3B", "N300", 51.5, "2026", f"{_TTTV2_3B}, TTTv2", excluded=HOST),
    _demo("3B", "T3K", 20.4, "2026", f"{_TTTV2_3B}, TTTv2", excluded=HOST),
    Point(
        *("8B", "N150", "performance", SERVED, 164.0, "2026-06-29", "tt-xla", "tt-xla, table of performance"),
        excluded="impossible: 6.2 GB of weights a token would be 1000 GB/s of the chip's 288",
        possible=False,
    ),
)

ALL = _OF_2025 + _OF_2026
POINTS = tuple(point for point in ALL if not point.excluded)


def best_plain(model: str, board: str) -> Point | None:
    """The fastest plain decoding that has been published for a model on a board, at a short context; for P300 that of
    two P150 cards, which are the same chips. None where nothing has been published."""
    alike = {board, *(["2xP150"] if board == "P300" else [])}
    known = [p for p in ALL if p.model == model and p.board in alike and p.possible and p.context < 4096]
    return max(known, key=lambda point: point.tok_s_user, default=None)


# ---- observations ---------------------------------------------------------------------------------------------------


def matrices(config: LlamaConfig) -> dict[str, int]:
    """Tiles of the matrices of a model that share a fidelity, of all layers together."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    attention = config.hidden_size * config.head_dim * 2 * (heads + kv_heads)
    mlp = config.hidden_size * config.intermediate_size
    layers = config.num_hidden_layers
    return {
        "attention": layers * attention // 1024,
        "gate_up": layers * 2 * mlp // 1024,
        "down": layers * mlp // 1024,
        "head": config.hidden_size * config.vocab_size // 1024,
    }


def fidelities_of(precision: Precision) -> dict[str, str]:
    """The fidelity of each of `matrices`."""
    return {
        "attention": precision.attention_fidelity,
        "gate_up": precision.gate_up_fidelity,
        "down": precision.down_fidelity,
        "head": precision.head_fidelity,
    }


def extra_phases(config: LlamaConfig, fidelities: dict[str, str], layers: int | None = None) -> float:
    """Tiles of weights times the phases beyond LoFi's one in which they are multiplied, on all chips together."""
    share = 1.0 if layers is None else layers / config.num_hidden_layers
    tiles = matrices(config)
    return sum(
        (1.0 if name == "head" else share) * tiles[name] * (PHASES[fidelity] - 1)
        for name, fidelity in fidelities.items()
    )


def observation(point: Point, counts: Counts) -> Observation:
    """A figure with what its step asks of each chip: our bytes, and tt_transformers' exchanges and attention."""
    chip, config = _CHIPS[point.board], named_config(point.model)
    place = Place(_ALIKE.get(point.board, point.board), chip.chips)
    layers = counts.layers(place, point.model, point.precision)
    work = _their_forward(counts, place, point, point.precision, layers, chip.chips)
    if (point.model, point.precision, point.software) == ("8B", "performance", DEMO):
        # PERF.md: the last layer keeps bfp8 gate and up matrices.
        work = _their_forward(counts, place, point, "performance", layers - 1, chip.chips)
        layer, _ = counts.parts(place, point.model, "accuracy", 1, point.context)
        work += _their_layer(layer, chip.chips)
    heads = config.num_key_value_heads // chip.chips
    fidelities = fidelities_of(precision_named(point.precision)) | dict(point.fidelities)
    step = Step(
        work,
        chip,
        layers,
        extra_phases(config, fidelities) / chip.chips,
        config.head_dim,
        heads * min(MOST_ATTENTION_CORES, chip.cores // heads),
        point.year,
        point.waits,
        point.served,
    )
    return Observation(point, step, ms=1000 / point.tok_s_user)


def _their_forward(counts: Counts, place: Place, point: Point, precision: str, layers: int, chips: int) -> Work:
    layer, outside = counts.parts(place, point.model, precision, 1, point.context)
    return layers * _their_layer(layer, chips) + outside


def _their_layer(layer: Work, chips: int) -> Work:
    exchanges = LAYER_EXCHANGES if chips > 1 else 0
    return Work(LAYER_PROGRAMS + exchanges, exchanges, layer.weights, layer.kv_cache, layer.other)
