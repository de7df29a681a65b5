"""Which atoms each row of a sparse table combines, in the fewest bytes: a bit for every atom, or a number for each."""

import torch


# Index types with the largest table of atoms that each can number; torch scatters with none of them, so that they are
# widened for use.
INDEX_TYPES = ((torch.uint8, 2**8), (torch.int16, 2**15), (torch.int32, 2**31))


def support_kind(atoms, nonzeros):
    """`(name, dtype, entries a row)` of the smallest way to say which `nonzeros` of `atoms` a row has.

    `"mask"` is a bit an atom, padded to whole bytes; `"indices"` an integer for each atom that is there. `None` where
    every atom is.
    """
    if nonzeros == atoms:
        return None
    dtype = next(dtype for dtype, limit in INDEX_TYPES if atoms <= limit)
    packed = -(-atoms // 8)
    if packed <= nonzeros * dtype.itemsize:
        return "mask", torch.uint8, packed
    return "indices", dtype, nonzeros


def pack_supports(supports, atoms):
    """The bits of `supports` `(rows, nonzeros)`, int64: `(rows, ceil(atoms / 8))`, uint8, lowest bit first."""
    width = -(-atoms // 8)
    bits = torch.zeros(len(supports), width * 8, dtype=torch.uint8, device=supports.device)
    bits.scatter_(1, supports, 1)
    return (bits.view(-1, width, 8) << _shifts(bits)).sum(-1, dtype=torch.uint8)


def unpack_mask(mask, atoms):
    """The other way: `(rows, atoms)`, bool."""
    return (mask[:, :, None] >> _shifts(mask) & 1).flatten(1)[:, :atoms].bool()


def _shifts(like):
    return torch.arange(8, dtype=torch.uint8, device=like.device)
