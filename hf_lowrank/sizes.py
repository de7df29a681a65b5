"""How many bytes a model takes on disk, told from shapes alone."""

import torch


# The JSON header of a safetensors file names every tensor: its own characters, dtype, shape and two offsets.
ENTRY = 128
# The fixed part of the header, in several files if need be.
HEADER = 1024


def stored_bytes(model, sites=(), shifts=False, tensors=2):
    """Bytes of the safetensors files of `model` as it stands: every tensor once, and an upper bound of the headers.

    Args:
        model (`torch.nn.Module`): dense; may be on the meta device.
        sites (`list[Site]`, *optional*): weights that may become factors, get a bias, or be stored one copy at a time,
            which makes more entries in the headers.
        shifts (`bool`, defaults to `False`): whether they get a bias if they have none.
        tensors (`int`, defaults to 2): what is stored at most for one weight, bias excluded.
    """
    # Where nothing is loaded yet, only the declaration tells which parameters are one.
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    unsaved = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    seen, total = set(), HEADER
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor) or name in unsaved or id(tensor) in seen:
            continue
        if tensor.is_meta and name in tied:
            continue
        seen.add(id(tensor))
        total += tensor.numel() * tensor.element_size() + len(name) + ENTRY
    return total + sum(_entries(site, shifts, tensors) * (len(site.name) + ENTRY) for site in sites)


def tensor_bytes(tensor):
    """Bytes of a tensor; of one that packs others (torchao's are such), the bytes of all of these."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def numbers(tensor):
    """How many numbers a tensor stands for; of 4-bit integers that bitsandbytes packs in bytes, those before."""
    state = getattr(tensor, "quant_state", None)
    return tensor.numel() if state is None else state.shape.numel()


def _entries(site, shifts, tensors):
    """How many more tensors a site may take than the dense model has parameters for it."""
    return 2 * site.copies if site.copies > 1 else tensors - 1 + (shifts and not site.bias)
