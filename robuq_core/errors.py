"""The base of errors that a user can fix."""


class UserError(Exception):
    """Something outside the program is wrong; the message names the field or file and the fix."""
