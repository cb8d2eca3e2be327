"""Text for a terminal."""

# Characters that a terminal would obey. C0 become pictures of themselves; C1 (U+009B begins a command as ESC [ does)
# and those that turn the direction of writing become their numbers, as on the HTML page.
CONTROLS: dict[int, int | str] = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
DIRECTIONS = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
CONTROLS |= {0x7F: 0x2421} | {code: f"⟨U+{code:04X}⟩" for code in (*range(0x80, 0xA0), *DIRECTIONS)}


def visible(text: str) -> str:
    """The text with visible characters for those that a terminal would obey; lines and tabs stay."""
    return text.translate(CONTROLS)


def plural(count: int, unit: str) -> str:
    """A number of things: "1 token", "2 tokens"."""
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"
