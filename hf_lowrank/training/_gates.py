"""Gates between the two factors of a layer, through which only its leading components pass in training."""

import torch


def close_gates(layers, ranks):
    """In training mode, let layers compute with their leading components only.

        y = left[:, :b] right[:b] x + b

    Args:
        layers (`dict[str, LowRankLinear]`): all layers, by name.
        ranks (`dict[str, int]`): how many components; a layer that is not named has all of them.
    """
    for name, layer in layers.items():
        gate = None
        if name in ranks:
            # A tensor, so that compiled code does not depend on the number; a new one each time, since the backward
            # pass of an earlier forward pass may still want the last.
            gate = torch.arange(layer.rank, device=layer.right.weight.device) < ranks[name]
        layer.right.open_components = gate
        if not hasattr(layer.right, "gate_hook"):
            layer.right.gate_hook = layer.right.register_forward_hook(_pass)


def open_gates(layers):
    """Let layers compute with all components."""
    close_gates(layers, {})


def take_gates_off(layers):
    """Leave nothing of the gates behind."""
    for layer in layers.values():
        if hasattr(layer.right, "gate_hook"):
            layer.right.gate_hook.remove()
            del layer.right.gate_hook, layer.right.open_components


def _pass(right, args, output):
    gate = right.open_components
    return output if gate is None or not right.training else output * gate
