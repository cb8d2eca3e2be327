"""A picture of the chat page after a real answer: python -m tests.chat_picture FILE.png [arguments of the server]

It is of the page as it stands in a window when one question was answered with drafts and plainly, on this machine.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from models.cli.command import run_command
from models.cli.environment import check_writable
from models.errors import UserError
from tests.browser import Browser, start_browser

# Of demo/prompts/instruct.txt: its answer repeats much of it, which is where drafts are right most often.
QUESTION = (
    "Correct the mistakes in this text and print only the corrected text: "
    '"She go to the market every days and buyed fresh vegetable, becuase she like to cooking."'
)
SIZE = (1000, 520)
MAX_BYTES = 150_000
ANSWER_S = 300


def take(browser: Browser, file: Path, question: str, seconds: float = ANSWER_S) -> None:
    """Ask the page that is open, compare with plain, write a PNG. Raises UserError where there is no answer."""
    browser.click("#compare")
    browser.type("#message", question)
    browser.press("ENTER")
    browser.until("!document.querySelector('#send').hidden", seconds)
    if error := browser.text("#error"):
        raise UserError(f"no answer: {error}")
    browser.run("document.activeElement.blur()")
    browser.screenshot(file, whole=False)
    if (size := file.stat().st_size) > MAX_BYTES:
        raise UserError(f"{file} has {size} bytes, more than {MAX_BYTES}: ask for fewer tokens")


def command(argv: Sequence[str] | None = None) -> int:
    """Serve, ask, write. Raises UserError for a missing file name, and for whatever the server refuses."""
    from tests.server_fixtures import ServerProcess

    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments or not arguments[0].endswith(".png"):
        raise UserError("name the picture: python -m tests.chat_picture FILE.png [arguments of the server]")
    check_writable(arguments[0], "FILE")
    server = ServerProcess(*arguments[1:])
    try:
        server.ready()
        browser = start_browser()
        try:
            browser.resize(*SIZE)
            browser.open(server.url + "/")
            browser.until("document.querySelectorAll('[name=drafter] option').length > 2")
            take(browser, Path(arguments[0]), QUESTION)
        finally:
            browser.close()
    finally:
        server.close()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(command))
