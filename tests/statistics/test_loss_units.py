"""The error of `kfac_svd` is the change of the loss, at every layer: encoder or decoder, attention or expert."""

import pytest
import torch

from hf_lowrank import LowRankConfig, collect_statistics
from hf_lowrank.factorize import measure_site, site_factors
from hf_lowrank.surgery import match_sites
from hf_lowrank.testing import tiny_model


STEP = 0.3
RECIPE = LowRankConfig(method={"name": "kfac_svd", "input_shrinkage": 0.0, "grad_shrinkage": 0.01})


def batches_for(name):
    def ids(*shape):
        return torch.randint(3, 90, shape, generator=generator)

    generator = torch.Generator().manual_seed(0)
    if name == "t5":
        return [{"input_ids": ids(16, 40), "decoder_input_ids": ids(16, 4)} for _ in range(4)]
    return [{"input_ids": ids(16, 24)} for _ in range(4)]


def predictions(model, batches):
    with torch.no_grad():
        return torch.cat([model(**batch).logits.double().log_softmax(-1).flatten(0, -2) for batch in batches])


@pytest.mark.parametrize("name", ["llama", "t5", "mixtral", "qwen3_moe"])
def test_one_unit_for_all_layers(name):
    model = tiny_model(name)[0].eval()
    batches = batches_for(name)
    statistics = collect_statistics(model, batches, method="kfac_svd")
    before, found = predictions(model, batches), {}
    for site in match_sites(model):
        weight = site.kind.weight(model, site)
        rank = min(site.out_features, site.in_features) // 2
        expected = 0.5 * STEP**2 * float(measure_site(site, weight, RECIPE, statistics)[rank])
        factors = site_factors(site, weight, rank, RECIPE, statistics)
        dense = weight.clone()
        # A view of the parameter: a small part of the way, where the loss is a parabola.
        weight.add_(STEP * (torch.stack([f.product() for f in factors]).to(weight.dtype) - dense))
        found[site.name] = (before.exp() * (before - predictions(model, batches))).sum().item(), expected
        weight.copy_(dense)
    # Queries and keys of models that have learned nothing hardly matter: there, the change is rounding.
    largest = max(expected for _, expected in found.values())
    ratios = {site: change / expected for site, (change, expected) in found.items() if expected > 0.01 * largest}
    centre = torch.tensor(list(ratios.values())).median().item()
    assert 0.25 < centre < 4
    assert len(ratios) >= len(found) // 2
    apart = {site: ratio / centre for site, ratio in ratios.items() if not 1 / 3 < ratio / centre < 3}
    assert not apart
