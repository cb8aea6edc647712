"""The one exception that a person is meant to read."""


class AntgmmError(Exception):
    """A fault of input or environment: one line that names the thing and the remedy.

    The command line prints it without a traceback and exits with a non-zero status.
    """
