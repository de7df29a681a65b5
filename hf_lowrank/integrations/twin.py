"""A second model beside the dense one, which becomes the compressed model without a copy of the large weights."""

import copy


def twin_of(model, sites, names):
    """A copy of `model` that shares every parameter but the small ones inside its blocks, which may be trained.

    Args:
        model (`torch.nn.Module`): dense.
        sites (`list[Site]`): what will be replaced in the twin, and is shared until then.
        names (`list[str]`): the blocks.
    """
    dense = {site.weight_name for site in sites}
    memo = {
        id(parameter): parameter
        for name, parameter in model.named_parameters()
        if name in dense or not any(name.startswith(f"{block}.") for block in names)
    }
    return copy.deepcopy(model, memo)
