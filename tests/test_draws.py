"""What a draw depends on, and how often it falls which way."""

import pytest
import torch
from torch import nn

from hf_lowrank.draws import TwoBranches, deal, draw, draws, two_branch_layers


class Gate(nn.Module, TwoBranches):
    pass


def drawn(model):
    return [layer.drawn for layer in two_branch_layers(model).values()]


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_frequency(probability):
    found = torch.tensor([draws(20, probability, seed=7, step=step) for step in range(2000)], dtype=torch.float64)
    # Five standard deviations of a mean of 40000 draws; none at the ends.
    margin = 5 * (probability * (1 - probability) / found.numel()) ** 0.5
    assert abs(found.mean() - probability) <= margin
    # Every layer for itself, over the steps: the same for a mean of 2000.
    assert ((found.mean(0) - probability).abs() <= margin * 20**0.5).all()


def test_layers_turns_steps_and_seeds_are_independent():
    def sequence(seed=0, turn=0):
        return torch.tensor([draws(2, 0.5, seed, step, turn) for step in range(4000)], dtype=torch.float64) - 0.5

    one = sequence()
    pairs = {
        "layers": (one[:, 0], one[:, 1]),
        "turns": (one, sequence(turn=1)),
        "seeds": (one, sequence(seed=1)),
        "steps": (one[1:], one[:-1]),
    }
    for name, (a, b) in pairs.items():
        correlation = 4 * (a * b).mean()
        assert correlation.abs() < 5 / a.numel() ** 0.5, name


def test_only_the_arguments_decide():
    one, other = nn.Sequential(*[Gate() for _ in range(9)]), nn.Sequential(*[Gate() for _ in range(9)])
    assert drawn(one) == [None] * 9
    draw(one, 0.5, seed=3, step=5)
    expected = drawn(one)
    assert {True, False} == set(expected)
    torch.manual_seed(1)
    for step in (9, 2, 5):
        torch.rand(3)
        draw(other, 0.5, seed=3, step=step)
    assert drawn(other) == expected
    state = torch.random.get_rng_state()
    draw(other, 0.5, seed=3, step=6)
    assert torch.equal(torch.random.get_rng_state(), state), "nor does a draw disturb other randomness"
    assert drawn(other) != expected


def test_layers_of_other_kinds_are_left_alone():
    model = nn.Sequential(nn.Linear(2, 2), Gate())
    draw(model, 1.0, seed=0, step=0)
    assert list(two_branch_layers(model)) == ["1"]
    assert not hasattr(model[0], "drawn")


def test_a_deal_has_every_number_once_and_is_shuffled_anew():
    found = [[deal(7, 7 * cycle + turn, 3, 0) for turn in range(7)] for cycle in range(20)]
    assert all(sorted(cycle) == list(range(7)) for cycle in found)
    assert len({tuple(cycle) for cycle in found}) > 15
    for other in ((4, 0), (3, 1), (0, 3)):
        assert [deal(7, turn, *other) for turn in range(140)] != [number for cycle in found for number in cycle]
    # Nothing but the arguments counts.
    torch.manual_seed(1)
    assert [deal(7, turn, 3, 0) for turn in range(7)] == found[0]


def test_a_deal_is_fair():
    first = torch.tensor([deal(5, 5 * cycle, 0) for cycle in range(2000)])
    # Five standard deviations of the count of one of five equally likely outcomes.
    assert (first.bincount(minlength=5) - 400).abs().max() <= 5 * (2000 * 0.2 * 0.8) ** 0.5
