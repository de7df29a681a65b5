import copy

import pytest

from hf_lowrank import LowRankConfig, Report, factorize, report
from hf_lowrank.reporting.budget import Budget
from hf_lowrank.reporting.layers import Layer
from hf_lowrank.reporting.spectrum import Spectrum
from hf_lowrank.testing import tiny_model


HOSTILE = "<script>window.hacked = 1</script>\"'><img src=x onerror='window.hacked = 1'>"


def evaluation(perplexity, accuracy=None, sha="a"):
    """The JSON of an evaluation, as far as it matters here."""
    text = {"perplexity": perplexity, "windows": 4, "window": 64, "bos": False}
    task = {"metric": "acc_norm", "acc_norm": accuracy, "acc_norm_stderr": 0.02, "items": 100}
    return {
        "perplexity": {"wikitext2": text},
        "multiple_choice": {} if accuracy is None else {"piqa": task},
        "data": {"wikitext2": {"sha256": sha}, "piqa": {"sha256": "b"}},
    }


@pytest.fixture(scope="session")
def full():
    """A report with everything in it: the dense model, a layer left dense, one outside of blocks, strange texts."""
    dense, _ = tiny_model("llama")
    config = LowRankConfig(
        method="svd",
        param_ratio=0.5,
        rank_pattern={"layers.1.mlp.up_proj": "dense"},
        target_modules=r".*_proj|lm_head",
    )
    model = factorize(copy.deepcopy(dense), config)
    return report(
        model,
        dense=dense,
        quality={"dense": evaluation(14.703, 0.68), HOSTILE: evaluation(15.59, 0.665)},
        samples=[{"prompt": HOSTILE, "texts": {"dense": "Paris and Rome", HOSTILE: f"Paris and {HOSTILE}"}}],
    )


@pytest.fixture(scope="session")
def page(full):
    """Its page."""
    return full.html()


@pytest.fixture(scope="session")
def large():
    """A report of a model of 80 blocks of 7 layers, some of them dense."""
    layers = []
    for block in range(80):
        for index, projection in enumerate("qkvogud"):
            rank = None if (block + index) % 13 == 0 else 8 * (40 + (7 * block + 3 * index) % 60)
            kept = 4096 * 4096 if rank is None else rank * 8192
            values = [float(f"{(i + 1) ** -0.4:.6g}") for i in range(0, rank or 1, max((rank or 1) // 63, 1))]
            index_of = [1 + i * max((rank or 1) // 63, 1) for i in range(len(values))]
            layer = Layer(
                f"model.layers.{block}.self_attn.{projection}_proj", "dense" if rank is None else "low_rank", rank,
                "4096 x 4096", kept, 4096 * 4096, 2 * kept, 2 * 4096 * 4096, None if rank is None else 2048,
                None if rank is None else 0.3, full_rank=4096, stack="model.layers", block=block,
                projection=f"{projection}_proj", error_share=None if rank is None else 1 / 520,
                spectrum=None if rank is None else Spectrum(index_of[-1], index_of, values),
            )  # fmt: skip
            layers.append(layer)
    kept, dense = (sum(getattr(layer, key) for layer in layers) for key in ("parameters", "dense_parameters"))
    return Report(
        model={"name": "someone/large", "class": "LlamaForCausalLM", "dtype": "bfloat16"},
        recipe={"method": {"name": "kfac_svd", "grad_shrinkage": 0.3}, "param_ratio": 0.5},
        environment={"hf-lowrank": "0"},
        budget=Budget("param_ratio", 0.5, kept / dense, len(layers), 0),
        parameters=kept,
        dense_parameters=dense,
        bytes=2 * kept,
        dense_bytes=2 * dense,
        layers=layers,
        quality={},
        samples=[],
    )
