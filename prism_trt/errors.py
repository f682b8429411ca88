"""The one exception a user is meant to see."""


class PrismError(Exception):
    """A mistake the user can fix.

    The message is one sentence that says what is wrong and how to fix it. Command lines print it without a traceback
    and exit with code 2; the server returns it as an ``INVALID_ARG`` error.
    """
