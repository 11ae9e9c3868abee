"""W3C trace context: which trace a request belongs to, as its ``traceparent`` header tells."""

from __future__ import annotations

import random
import re
from typing import NamedTuple

# version, trace id, parent id, flags; versions after 00 may add fields.
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class TraceContext(NamedTuple):
    """Where in a trace a request stands: ids in lower-case hexadecimal, ``span_id`` being this server's own."""

    trace_id: str
    span_id: str
    sampled: bool

    @property
    def traceresponse(self) -> str:
        """The header of the answer, by which a caller finds this server's part of the trace."""
        return f"00-{self.trace_id}-{self.span_id}-{self.sampled:02x}"


def from_traceparent(header: str) -> TraceContext | None:
    """The trace that a caller has begun, or None if the header is none by the W3C's rules."""
    match = _TRACEPARENT.fullmatch(header.strip())
    if match is None:
        return None
    version, trace_id, parent_id, _, more = match.groups()
    if version == "ff" or (version == "00" and more) or not int(trace_id, 16) or not int(parent_id, 16):
        return None
    # Nothing is recorded here, so the answer says "not sampled", whatever the caller does on its side.
    return TraceContext(trace_id, f"{random.getrandbits(64) or 1:016x}", False)
