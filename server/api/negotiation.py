"""Which of our answers a client's ``Accept`` header asks for (RFC 9110, section 12.5.1)."""

from __future__ import annotations

from collections.abc import Sequence


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.strip().partition("=")
        if name.lower() == "q":
            try:
                return min(1.0, max(0.0, float(value)))
            except ValueError:
                return 0.0
    return 1.0


def choose_media_type(accept: str, offered: Sequence[str]) -> str | None:
    """The offered type that ``accept`` likes best, the earlier offer on a tie; None if it likes none.

    An empty header accepts everything. The most specific range decides on a type: ``image/png;q=0, image/*`` takes
    any image but PNG.
    """
    if not accept.strip():
        return offered[0]
    ranges: dict[str, float] = {}
    for part in accept.split(","):
        media_range, *parameters = part.split(";")
        ranges[media_range.strip().lower()] = _quality(parameters)
    best, best_key = None, (0.0, 0)
    for media_type in offered:
        for specificity, media_range in ((3, media_type), (2, media_type.split("/")[0] + "/*"), (1, "*/*")):
            if media_range in ranges:
                # Quality first; among equals, a type that is named outright beats one that a wildcard lets through.
                key = (ranges[media_range], specificity)
                if key[0] > 0 and key > best_key:
                    best, best_key = media_type, key
                break
    return best
