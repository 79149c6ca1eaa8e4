"""One process at a time: a lock beside a file, which the system releases when its holder ends, however it ends."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lvlm_jax.errors import LVLMError

# What file systems without locks say. Nothing protects from a second run there, but one run works.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Holds the lock of the file `path`, by way of `.NAME.lock` beside it.

    Args:
        path: the file; it need not exist, but its folder must.
        wait: until another process releases the lock.

    Raises:
        LVLMError: another process holds the lock, and this one does not wait.
        OSError: the folder cannot be written.
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
        # While it is held: who opens it now sees, once it has the lock, that the file is gone, and begins again.
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()
