"""Calibration batches for tiny models, and what they are at the end of the blocks."""

import torch

from hf_lowrank.blocks import Chain, block_names, find_chains, record
from hf_lowrank.statistics.collect import call_arguments
from hf_lowrank.surgery import match_sites


def batches_of(inputs, count=3):
    """Different batches of what `inputs` makes."""
    found = []
    for shift in range(count):
        batch = inputs()
        if "input_ids" in batch and "pixel_values" not in batch:
            batch["input_ids"] = (batch["input_ids"] + 5 * shift) % 80 + 3
        found.append(batch)
    return found


def last_hidden(model, dense, batches):
    """The hidden states after the last block of each chain, flat; `dense` tells what the chains are."""
    names = block_names(dense, [site.name for site in match_sites(dense)])
    ends = []
    with torch.no_grad():
        for chain in find_chains(dense, names, lambda: dense(**call_arguments(dense, batches[0]))):
            calls = [call_arguments(model, batch) for batch in batches]
            walk = record(model, Chain(chain.names), [lambda c=c: model(**c) for c in calls])
            for name in chain.names:
                walk.advance(model.get_submodule(name), name)
            ends.append(torch.cat([x.flatten() for x in walk.inputs]))
    return ends
