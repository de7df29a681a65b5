import pytest
import torch

from hf_lowrank import NonFiniteError
from hf_lowrank.linalg import largest


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.25, 1 / 3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("distinct", [1, 3, 1000])
def test_exactly_so_many_and_none_smaller_than_one_left_out(fraction, distinct):
    generator = torch.Generator().manual_seed(1)
    scores = [torch.randint(distinct, shape, generator=generator).float() for shape in ((7, 5), (40,), (3, 2, 4))]
    masks = largest(scores, fraction)
    assert [mask.shape for mask in masks] == [score.shape for score in scores]
    values, chosen = (torch.cat([t.flatten() for t in tensors]) for tensors in (scores, masks))
    assert int(chosen.sum()) == round(fraction * 99)
    # A stable sort puts the first of equal ones first.
    order = values.sort(descending=True, stable=True).indices[: round(fraction * 99)]
    assert set(order.tolist()) == set(chosen.nonzero().flatten().tolist())


def test_not_a_number_is_no_score():
    with pytest.raises(NonFiniteError, match="A gradient holds 1 NaN"):
        largest([torch.tensor([1.0, float("nan")])], 0.5, "A gradient")
