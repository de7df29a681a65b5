import pytest
import torch

from hf_lowrank.linalg import shortened


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 7), (torch.float16, 10)])
def test_two_bits_less_are_two_zero_bits_and_bounded(dtype, bits):
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(10_000, generator=generator, dtype=torch.float64)
    numbers[:3] = torch.tensor([0.0, 1.0, -0.5])
    short = shortened(numbers, bits - 2)
    stored = short.to(dtype)
    assert torch.equal(stored.double(), short), "no second rounding"
    assert not (stored.view(torch.int16) & 3).any()
    change = ((short - numbers).abs() / numbers.abs().clamp(min=1e-300)).max()
    assert 0.9 * 2.0 ** -(bits - 1) < change <= 2.0 ** -(bits - 1)
    assert torch.equal(short[:3], numbers[:3])
    assert torch.equal(shortened(short, bits - 2), short)
    # To the nearest: no number of that kind is closer.
    for other in (stored.view(torch.int16) + 4, stored.view(torch.int16) - 4):
        assert ((other.view(dtype).double() - numbers).abs() >= (short - numbers).abs())[3:].all()
