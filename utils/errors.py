"""The one exception that `main.py` shows to users without a traceback."""


class UserError(ValueError):
    """Something the user can put right: names what was received, where, what is allowed and what to do next.

    `main.py` prints the message and exits with code 2.
    """
