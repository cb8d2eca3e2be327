"""What a user may choose of a server, and its command line. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.cli.arguments import EPILOG, add_drafting_arguments, add_model_arguments, integer
from models.cli.command import Parser
from models.cli.default import is_open
from models.cli.settings import settings_of
from models.errors import UserError
from models.options import NAMED, EngineOptions

SLOTS, BOARD_SLOTS = 8, 1
API_KEY_VARIABLE = "SPECULATIVE_API_KEY"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServerSettings(EngineOptions):
    """The engine's options and those of the server; one field per flag.

    Args:
        host, port: to listen at; port 0: any free one.
        served_model_name: what clients call the model; None: the target's name.
        queue: texts that may wait for a slot.
        api_key: that requests have to bring; None: none.
        cors_origins: web pages elsewhere that browsers let in.
        max_body_bytes: of a request. body_timeout_s: within which all of a request has to come.
        drain_s: for texts under way, after SIGTERM.
        audit_every: one in so many texts is replayed against plain decoding; None: none.
        access_log: a line for each request.

    Raises:
        UserError: for what has no meaning.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    queue: int = 64
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 * 2**20
    body_timeout_s: float = 30.0
    drain_s: float = 30.0
    audit_every: int | None = None
    access_log: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.api_key is not None and not re.fullmatch(r"[\x21-\x7e]+", self.api_key):
            raise UserError("--api-key: give printable ASCII characters without spaces")
        for origin in self.cors_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise UserError(f"--cors-origin {origin!r}: give * or an origin, such as http://localhost:3000")

    @property
    def engine(self) -> EngineOptions:
        """The engine's options alone."""
        return EngineOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(EngineOptions)})

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        if self.served_model_name:
            return self.served_model_name
        for name, (checkpoint, _) in NAMED.items():
            if self.target == str(checkpoint):
                return name
        path = Path(self.target).expanduser()
        return path.resolve().name if path.exists() else self.target

    @property
    def is_open(self) -> bool:
        """Whether others than this machine can reach it."""
        return self.host not in LOOPBACK


def build_parser(environ: Mapping[str, str]) -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog="scripts/serve.sh",
        description="An OpenAI-compatible server. Without arguments: SmolLM2-135M, a small chat model (93 MB, fetched\n"
        "once), at http://127.0.0.1:8000/v1; where it cannot be fetched, the small pair of this project.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    group.add_argument(
        "--port", type=integer(0, 65535), default=8000, metavar="N", help="0: any free one (default: %(default)s)"
    )
    group.add_argument("--served-model-name", metavar="NAME", help="what clients call it (default: the target's name)")
    group.add_argument(
        "--slots",
        type=integer(1),
        metavar="N",
        help=f"texts that are written at once, each with a cache (default: {SLOTS}; on a board {BOARD_SLOTS})",
    )
    group.add_argument(
        "--pool-size",
        type=integer(2),
        metavar="N",
        help="tokens that the KV cache holds of all texts together (default: --slots times --max-seq-len, or "
        "on cpu and cuda what the free memory holds, if that is less)",
    )
    group.add_argument(
        "--queue",
        type=integer(0),
        default=64,
        metavar="N",
        help="texts that may wait for a slot; others are told to come back (default: %(default)s)",
    )
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"that requests have to bring; {API_KEY_VARIABLE} does the same and shows in no list of processes",
    )
    group.add_argument(
        "--cors-origin",
        dest="cors_origins",
        action="append",
        metavar="ORIGIN",
        help="a web page elsewhere whose scripts may use this server, or *; may be given several times (default: none)",
    )
    group.add_argument(
        "--max-body-bytes",
        type=integer(1024),
        default=4 * 2**20,
        metavar="N",
        help="of a request's body (default: %(default)s)",
    )
    group.add_argument(
        "--drain-seconds",
        dest="drain_s",
        type=float,
        default=30.0,
        metavar="S",
        help="for texts under way, after SIGTERM (default: %(default)s)",
    )
    group.add_argument(
        "--audit-every",
        type=integer(1),
        metavar="N",
        help="replay one in N texts against plain decoding while nothing else is to be done, and count what is found "
        "(default: none)",
    )
    group.add_argument("--access-log", action="store_true", help="a line on stderr for each request")
    group.add_argument("--quiet", action="store_true", help="nothing but warnings on stderr")
    add_model_arguments(parser, environ, "smollm2; on a board, and where it cannot be fetched, tiny")
    add_drafting_arguments(parser)
    return parser


def parse_settings(
    argv: Sequence[str] | None,
    environ: Mapping[str, str] = os.environ,
    choose: Callable[[argparse.Namespace], str] | None = None,
) -> ServerSettings:
    """Settings from a command line. Raises UserError for anything wrong in it.

    choose: names the target where the command line leaves it open; None: the embedded pair.
    """
    options = build_parser(environ).parse_args(argv)
    options.slots = options.slots or (BOARD_SLOTS if options.device == "tt" else SLOTS)
    options.api_key = options.api_key or environ.get(API_KEY_VARIABLE) or None
    options.cors_origins = tuple(options.cors_origins or ())
    if choose and is_open(options):
        settings_of(ServerSettings, options, environ)  # a mistake is answered before anything is fetched
        options.target = choose(options)
    return settings_of(ServerSettings, options, environ)
