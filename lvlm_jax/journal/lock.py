"""A lock beside a file, for one process at a time; the system releases it when its process ends, however it ends."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lvlm_jax.errors import LVLMError

# Errors of file systems without locks. There, nothing prevents a second run, but one run works.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Locks the file `path`, with the lock file `.NAME.lock` beside it.

    Args:
        path: the file; it need not exist, but its folder must.
        wait: whether to wait until another process releases the lock.

    Raises:
        LVLMError: another process has the lock, and `wait` is false.
        OSError: the folder cannot be written to.
    """
    real = path.resolve()
    lock = FileLock(real.with_name(f".{real.name}.lock"), thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout as error:
        raise LVLMError(f"{str(path)!r} is being written by another run; wait for it") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    try:
        yield
    finally:
        # Removed while locked: a process that has already opened it notices, once it gets the lock, that the file is
        # gone, and starts over.
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()
