"""The exception for errors that the user can fix."""


class AntgmmError(Exception):
    """An error in the input or the environment; its one-line message names the cause and the remedy.

    The command line prints the message without a traceback and exits with a non-zero status.
    """
