import pytest
import torch

from hf_lowrank.linalg import energy_rank, low_rank_projection
from hf_lowrank.testing import make_weight


def test_energy_rank():
    energies = torch.tensor([5.0, 3.0, 1.0, 1.0, 0.0])
    assert [energy_rank(energies, share) for share in (0.1, 0.5, 0.51, 0.8, 0.81, 0.9, 1.0)] == [1, 1, 2, 2, 3, 3, 4]
    assert energy_rank(torch.zeros(3), 0.9) == 0


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("shrink", [0.0, 0.2])
def test_is_the_proximal_step_cut_at_a_rank(shape, shrink):
    weight = make_weight(*shape)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    seen = []
    projected, direction, rank = low_rank_projection(weight, lambda energies: seen.append(energies) or 5, shrink)
    assert rank == 5
    torch.testing.assert_close(seen[0], (s - shrink).clamp(min=0).square())
    torch.testing.assert_close(projected, (u[:, :5] * (s[:5] - shrink).clamp(min=0)) @ v[:5])
    torch.testing.assert_close(direction, u[:, :5] @ v[:5])


def test_no_matrix_nearby_has_a_smaller_objective():
    # |X - W|^2 / 2 + shrink |X|_*, whose minimum the proximal step is.
    weight = make_weight(8, 12)
    best = low_rank_projection(weight, lambda energies: int((energies > 0).sum()), 0.3)[0]

    def objective(x):
        return float((x - weight).square().sum() / 2 + 0.3 * torch.linalg.svdvals(x).sum())

    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 0.1):
        for _ in range(20):
            assert objective(best) < objective(best + size * torch.randn(8, 12, generator=generator).double())


def test_degenerate_matrices():
    for degeneracy in ("zero", "low_rank", "duplicated_rows"):
        weight = make_weight(10, 14, degeneracy=degeneracy)
        projected, direction, _ = low_rank_projection(weight, lambda energies: 10)
        torch.testing.assert_close(projected, weight, rtol=1e-6, atol=1e-9)
        assert torch.isfinite(direction).all()
