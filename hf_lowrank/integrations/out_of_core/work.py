"""The folder in which a factorization is at work, and what is kept there between two calls."""

import contextlib
import os
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from ...errors import CheckpointError, ResourceError


LOCK = ".lock"
PARTS, CALIBRATION, CHECKPOINT = "parts", "calibration", "checkpoint"


@contextlib.contextmanager
def alone_in(work):
    """Inside, no other process works in the folder `work`; it goes if nothing is finished in it.

    Raises:
        ResourceError: another process is at work there.
    """
    os.makedirs(work, exist_ok=True)
    lock = FileLock(os.path.join(work, LOCK))
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ResourceError(f"Another process is at work in {work}; wait for it, or name another target.") from error
    try:
        yield
    finally:
        if not any(Path(work).rglob("*.safetensors")):
            clear(work)
        lock.release()


def clear(work):
    """Remove what was made in the work folder, and the folder if it holds nothing else."""
    for name in (PARTS, CALIBRATION, CHECKPOINT):
        shutil.rmtree(os.path.join(work, name), ignore_errors=True)
    with contextlib.suppress(OSError):
        os.remove(os.path.join(work, LOCK))
        os.rmdir(work)


def begin(parts, sources):
    """Note what the source is, or refuse one that is not what it was when the work was begun.

    Args:
        parts ([`Parts`]): in the work folder.
        sources (`dict[str, str]`): sha256 by file name.

    Raises:
        CheckpointError: a file that is another one, with its name.
    """
    if parts.facts is None:
        parts.begin({"sources": sources})
    before, work = parts.facts["sources"], os.path.dirname(parts.folder)
    for name in sorted({*before, *sources}):
        if before.get(name) != sources.get(name):
            raise CheckpointError(
                f"{name} of the source is damaged or another file than when this was begun: its sha256 is "
                f"{sources.get(name)}, and was {before.get(name)}. Restore it, or remove {work} to begin anew."
            )
