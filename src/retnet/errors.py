"""`UserError`: a user's mistake, the one error that command lines print without a traceback."""


class UserError(ValueError):
    """A mistake the user can mend. Command lines print its message alone, never a traceback."""
