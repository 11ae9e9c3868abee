"""What is wrong with data, in one line."""

from robuq_core.errors import UserError


class DataError(UserError):
    """Data that cannot be trained on; the message names the file and the fix."""
