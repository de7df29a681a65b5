"""Numbers with fewer bits than they are stored in."""

import torch


def shortened(tensor, bits):
    """Every number rounded to the nearest with `bits` bits behind its leading one, a relative change of 2^-(bits + 1).

    Args:
        tensor (`torch.Tensor`): float64 or float32, finite.
        bits (`int`): of the mantissa without the leading one; bfloat16 has 7, float16 has 10.
    """
    mantissa, exponent = torch.frexp(tensor)
    # Mantissas are in [0.5, 1).
    return torch.ldexp((mantissa * 2.0 ** (bits + 1)).round() * 2.0 ** -(bits + 1), exponent)
