"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """Something the user can put right: one line that names what is wrong, the value, and the remedy.

    Command lines print it as ``error: ...`` on stderr and exit with code 2; it never shows a traceback.
    """
