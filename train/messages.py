"""How errors of libraries are quoted in the messages of this program."""

from __future__ import annotations


def one_line(error: BaseException, most: int = 300) -> str:
    """The message of ``error`` on one line, cut to ``most`` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."
