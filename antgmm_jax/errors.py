"""The exception for errors that the user can fix."""

import errno

_OF_THE_DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE),
    *(errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
)


class AntgmmError(Exception):
    """An error in the input or the environment; its one-line message names the cause and the remedy.

    The command line prints the message without a traceback and exits with a non-zero status.
    """


def disk_error(error: OSError, place: object = "a file") -> AntgmmError | None:
    """Returns the one-line error for a disk that is full, read-only, not permitted or broken; None for other errors.

    Args:
        error: error of a file.
        place: what was written, for an error that does not name its file.
    """
    if error.errno not in _OF_THE_DISK:
        return None
    return AntgmmError(f"{error.filename or place}: {error.strerror}; fix this and start again")
