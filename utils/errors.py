"""The one exception that `main.py` shows to users without a traceback."""


class UserError(ValueError):
    """Something the user can put right: names what was received, where, what is allowed and what to do next.

    `main.py` prints the message and exits with code 2.
    """


class RankError(RuntimeError):
    """The processes that train one network have lost each other, or no longer train the same one.

    `main.py` prints the message and exits with code 4.
    """
