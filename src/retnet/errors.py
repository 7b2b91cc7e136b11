"""The one kind of error that command lines print without a traceback."""


class UserError(ValueError):
    """A mistake the user can mend. Command lines print its message alone, never a traceback."""
