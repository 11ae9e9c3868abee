"""The base of every error that a user can mend."""


class UserError(Exception):
    """Something outside the program is wrong; the message names the field or file and the fix."""
