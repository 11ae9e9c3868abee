"""What is raised when a measurement cannot be made."""

from __future__ import annotations

from robuq_core.errors import UserError


class EvaluationError(UserError):
    """A measurement that cannot be made; the message says what is missing."""
