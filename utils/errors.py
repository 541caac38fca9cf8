"""The one exception that `main.py` shows to users without a traceback."""


class UserError(ValueError):
    """Something the user can put right: names what was received, where, what is allowed and what to do next.

    `main.py` prints the message and exits with code 2.

    Attributes:
        on_one_rank: whether only this one of several processes may know of it, so that it has to say so itself. What is
            wrong before the processes have joined is wrong for all of them, and the first one says it.
    """

    on_one_rank: bool = False


class RankError(RuntimeError):
    """The processes that train one network have lost each other, or no longer train the same one.

    `main.py` prints the message and exits with code 4.

    Args:
        on_one_rank: as that of `UserError`.
    """

    def __init__(self, message: str, on_one_rank: bool = True) -> None:
        super().__init__(message)
        self.on_one_rank = on_one_rank
