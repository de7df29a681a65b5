"""Files that are there whole or not at all, and safetensors files written one tensor at a time."""

import contextlib
import errno
import hashlib
import json
import math
import os

import torch

from .errors import CheckpointError, ResourceError


PARTIAL = ".partial"
# Bytes of a file in memory at a time while it is hashed.
BLOCK = 1 << 20
# The disk, a quota, or the limit of a process.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What safetensors calls the dtypes. Its own writer puts tensors in the opposite order, so that all are aligned.
NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
ORDER = {dtype: position for position, dtype in enumerate(NAMES)}


@contextlib.contextmanager
def enough_space(path, cure="free some space and try again"):
    """Turn what the system says about a full disk inside into a [`ResourceError`] that names `path` and the `cure`."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ResourceError(f"Cannot write {os.fspath(path)}: {error.strerror}; {cure}.") from error


@contextlib.contextmanager
def writing(path):
    """A name to write to, which becomes `path` at the end, or is removed if that is not reached.

    Raises:
        ResourceError: the disk is full.
    """
    partial = f"{os.fspath(path)}{PARTIAL}"
    try:
        with enough_space(path):
            yield partial
            os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)


def write_json(path, content):
    """Write JSON to a file, which appears when it is complete."""
    with writing(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")


def write_tensors(path, layout, read, metadata=None):
    """Write a safetensors file that appears when it is complete, with one tensor in memory at a time.

    The bytes are those of safetensors' own writer, which wants all tensors at once.

    Args:
        path (`str`): the file.
        layout (`dict[str, tuple]`): `(dtype, shape)` of every tensor, shapes as tuples.
        read (`Callable[[str], torch.Tensor]`): a tensor by name; each is asked for once, in the order of the file.
        metadata (`dict[str, str]`, *optional*): goes into the header.

    Returns:
        `str`: the sha256 of what was written.

    Raises:
        ResourceError: the disk is full.
        CheckpointError: a tensor that is not what the layout says, or of a dtype that cannot be written.
    """
    unknown = sorted({str(dtype) for dtype, _ in layout.values()} - set(map(str, NAMES)))
    if unknown:
        raise CheckpointError(f"Cannot write {os.fspath(path)}: it would hold {unknown}; cast these tensors first.")
    names = sorted(layout, key=lambda name: (-ORDER[layout[name][0]], name))
    header, end = {} if metadata is None else {"__metadata__": metadata}, 0
    for name in names:
        dtype, shape = layout[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # The format wants numbers to start at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with writing(path) as partial, open(partial, "wb") as file:

        def put(data):
            file.write(data)
            digest.update(data)

        put(len(text).to_bytes(8, "little") + text)
        for name in names:
            put(raw(_announced(read(name), name, layout, path)))
    return digest.hexdigest()


def _announced(tensor, name, layout, path):
    if (tensor.dtype, tuple(tensor.shape)) == layout[name]:
        return tensor
    raise CheckpointError(
        f"{name} turns out as {tensor.dtype} {tuple(tensor.shape)}, and {layout[name]} was announced in "
        f"{os.fspath(path)}."
    )


def raw(tensor):
    """The bytes of a tensor, as an array that shares its memory where it can."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def sha256_of(path):
    """The sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
