import torch
from torch import nn

from ..errors import LowRankError
from ..formats import FormatLinear, LinearFace, LowRankLinear, as_parameter
from ..kinds import dense_kind, kind_of
from ..linalg import balanced
from ..methods import Factors
from ..statistics.collect import call_arguments, prepared
from ._linears import check_arguments, fixed_parameters, is_plain, linear_maps, shape_of
from ._trial import Trial, lender_of, same


def merge_linear(model, inputs):
    r"""Make one linear map of two where the second reads what the first puts out and nothing else does, in place.

        W_2 (W_1 x + b_1) + b_2 = (W_2 W_1) x + (W_2 b_1 + b_2)

    Of two dense layers the product is dense. If any of the two is two factors, these take in the other layer:
    `left_2 (right_2 W_1)` or `(W_2 left_1) right_1`, of the lower rank, or dense where that is smaller. A pair is
    merged only if there are fewer numbers in the end. The second layer becomes the product, and `torch.nn.Identity`
    stands where the first one was.

    Pairs are found by running a copy of the model on `inputs`: whatever the first layer puts out, the second has to
    read just that, in training too, so that there is neither a nonlinearity nor dropout between; and if the second
    does not, nothing else may change. Needs memory for a float32 copy of the model. Merge before an optimizer is
    built.

    The architecture of a transformers model has no place for merged layers, so that it cannot be saved any more;
    models of other libraries save what they hold.

    Args:
        model (`torch.nn.Module`): all of it in memory.
        inputs (`dict`): one batch of keyword arguments; a few samples are enough. Layers that it does not reach, that
            run more than once, carry hooks or adapters, or share weights stay as they are.

    Returns:
        `int`: how many pairs are one.

    Raises:
        ConfigError: `model` is not a module.
        CalibrationError: `inputs` is not a dict of tensors.
        LowRankError: some weights are not in memory.

    Reference:
        Layer merging of 2407.20266, from memory. Derived here: finding pairs by trial.
    """
    check_arguments(model, inputs)
    pairs = _pairs(model, inputs)
    merged = 0
    for first, second in pairs:
        merged += _merge(model, first, second)
    return merged


def _pairs(model, inputs):
    """`[(first, second)]` by name, of the layers between which there is nothing, in the order of the firsts."""
    fixed = fixed_parameters(model)
    layers = {name: layer for name, layer in linear_maps(model).items() if _is_free(name, layer, fixed)}
    shapes = {name: shape_of(layer) for name, layer in layers.items()}
    candidates = [(a, b) for a in layers for b in layers if a != b and shapes[a][0] == shapes[b][1]]
    if not candidates:
        return []
    with torch.no_grad(), torch.random.fork_rng(), prepared(model, backward=False):
        trial = Trial(model, (), call_arguments(model, inputs), list(layers))
        before = trial.run()
        found = []
        for first in layers:
            readers = [second for name, second in candidates if name == first and len(before[1][second]) == 1]
            for second in readers and _readers(trial, first, readers):
                if _is_only_reader(trial, before, first, second):
                    found.append((first, second))
        # Last, since it may change what normalizations remember.
        trial.block.train()
        return [(first, second) for first, second in found if _readers(trial, first, [second])]


def _is_free(name, layer, fixed):
    hooked = layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_hf_hook")
    plain = is_plain(name, layer, list(layer.state_dict()), fixed)
    return bool(name) and plain and not hooked and not isinstance(layer, LinearFace) and lender_of(layer) is None


def _anything(output):
    """Other values in the place of an output, of every size and sign: no activation leaves them as they are."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(output.shape, generator=generator) * torch.logspace(-3, 3, output.shape[-1])
    return noise.to(output)


def _readers(trial, first, candidates):
    """Those of `candidates` that read whatever `first` puts out, if it runs once."""
    made = []

    def note(output):
        made.append(_anything(output))
        return made[-1]

    _, seen = trial.run({first: note})
    if len(made) != 1:
        return []
    return [name for name in candidates if len(seen[name]) == 1 and torch.equal(seen[name][0], made[0])]


def _is_only_reader(trial, before, first, second):
    """Whether nothing changes with what `first` puts out, if `second` is given what it had."""
    original = before[1][second][0]
    outputs, seen = trial.run({first: _anything}, {second: lambda _: original})
    pairs = [(before[0], outputs), *((before[1][name], seen[name]) for name in seen)]
    return all(same(one, other) for one, other in pairs)


def _merge(model, first, second):
    """Merge one pair where that makes it smaller; 1 or 0."""
    one, two = model.get_submodule(first), model.get_submodule(second)
    before = sum(parameter.numel() for layer in (one, two) for parameter in layer.parameters())
    device, dtype = two.weight.device, two.weight.dtype
    w1, w2 = _wide(one, device), _wide(two, device)
    bias = _bias(one, two, w2)
    pair = min(_factors(one, two, w1, w2), key=lambda factors: factors[0].shape[1], default=None)
    rows, columns = len(w2), w1.shape[1]
    transposed = two.transposed if isinstance(two, FormatLinear) else kind_of(two).transposed
    if pair is not None and pair[0].shape[1] < LowRankLinear.break_even(rows, columns):
        made = LowRankLinear.from_factors(Factors(*balanced(*pair), 0.0), bias, dtype, transposed)
        made.relative_error = None
    else:
        kind = dense_kind(two) if isinstance(two, FormatLinear) else kind_of(two)
        made = kind.empty(columns, rows, bias is not None)
        product = w2 @ w1
        made.weight = as_parameter(product.T if transposed else product, dtype)
        if bias is not None:
            made.bias = as_parameter(bias, dtype)
    if sum(parameter.numel() for parameter in made.parameters()) >= before:
        return 0
    trainable = any(parameter.requires_grad for layer in (one, two) for parameter in layer.parameters())
    model.set_submodule(first, nn.Identity().train(one.training))
    model.set_submodule(second, made.requires_grad_(trainable).train(two.training))
    for name, part in model.named_modules():
        inside = not name or first.startswith(f"{name}.")
        if inside and hasattr(part, "save_pretrained") and _refuse_to_save not in part._state_dict_pre_hooks.values():
            part.register_state_dict_pre_hook(_refuse_to_save)
    return 1


def _wide(layer, device):
    """The dense weight `(out, in)`, float64."""
    if isinstance(layer, FormatLinear):
        return layer.exact_weight().to(device)
    weight = layer.weight.detach().double().to(device)
    return weight.T if kind_of(layer).transposed else weight


def _factors(one, two, w1, w2):
    """The pairs of factors of the product that the factors of either layer give."""
    found = []
    if isinstance(two, FormatLinear) and two.rest() is None:
        left, right = (factor.to(w1.device) for factor in two.factors())
        found.append((left, right @ w1))
    if isinstance(one, FormatLinear) and one.rest() is None:
        left, right = (factor.to(w1.device) for factor in one.factors())
        found.append((w2 @ left, right))
    return found


def _bias(one, two, w2):
    if one.bias is None:
        return None if two.bias is None else two.bias.detach().double()
    moved = w2 @ one.bias.detach().double().to(w2.device)
    return moved if two.bias is None else moved + two.bias.detach().double()


def _refuse_to_save(module, prefix, keep_vars):
    # With `keep_vars`, somebody looks at the tensors and does not write them.
    if not keep_vars:
        raise LowRankError(
            f"Layers of this {type(module).__name__} are merged, for which its architecture has no place, so that it "
            "could not be loaded again; save it before hf_lowrank.merge_linear, and merge after loading."
        )
