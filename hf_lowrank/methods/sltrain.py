import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..checks import check_choice, check_number
from ..linalg import largest_entries, require_finite, sparse_matrix, truncated_svd
from ._start import drawn_left, drawn_right, uniform
from .base import Factors, Method, register_method


SUPPORTS = ("random", "magnitude")


@register_method("sltrain")
@dataclass(frozen=True)
class SLTrain(Method):
    r"""Where pre-training from scratch begins, with a low-rank plus sparse matrix for every weight.

        min over L, R, v of the training loss,    W = alpha / r L R + S,    S.flat[indices] = v,
        L = 0,    R, v ~ U(-1/sqrt(in), 1/sqrt(in));    without S:    alpha / r L ~ U(-sqrt(3/r), sqrt(3/r))

    The weight that is replaced says nothing but its shape: this is for a model that was built from a config, and what
    a trained model knows would be lost, so that `from_pretrained` refuses it ([`SparseLowRank`] approximates trained
    weights). Which entries S has is drawn once, from `seed` and the name of the layer, and stored with it. A plain
    `Trainer` does the rest; the paper trains with AdamW without weight decay, at 3e-3 with 10 % warm-up and a cosine
    to a tenth, and leaves embeddings and heads dense, as the default targets do.

    With `density=0` it is low-rank training from scratch. L is drawn then, so that W has the variance of a new
    `nn.Linear`: of layers that are zero, one after the other, none gets a gradient, ever.

    Args:
        density (`float`, defaults to 0.03): entries of S as a share of those of W, in [0, 1]; the paper calls it
            sparsity, with 0.03 up to 1B parameters and 0.05 at 7B. An entry costs two numbers.
        alpha (`float`, defaults to 32.0): the factors count `alpha / r`, in (0, 1e9). The paper's alpha, rank and
            parameters: 32, 128, 60M; 16, 256, 130M and 350M; 8, 512, 1B; 8, 1024, 7B.
        support (`str`, defaults to `"random"`): `"magnitude"` takes the largest entries of what the best rank r
            leaves of the weight that is replaced; for comparison, on weights that were trained before.

    Shapes:
        weight `(out, in)`, left `(out, r)`, right `(r, in)`, rest `(out, in)`. Drawn in float64 on the CPU.

    Raises:
        ConfigError: an option out of range.

    Reference:
        Han et al., SLTrain, NeurIPS 2024, https://arxiv.org/abs/2406.02214. Differs: biases keep the start that their
        model gives them. `density=0` is [`RandomFactors`] with a scale.
    """

    format: ClassVar[str] = "sparse_low_rank"
    only_format: ClassVar[bool] = True
    initialises: ClassVar[bool] = True
    density: float = 0.03
    alpha: float = 32.0
    support: str = "random"

    def __post_init__(self):
        check_number("density", self.density, 0, 1, self.name)
        check_number("alpha", self.alpha, 0, 1e9, self.name, open_low=True, open_high=True)
        check_choice("support", self.support, SUPPORTS, self.name)

    def layout(self, out_features, in_features, rank):
        return {"nonzeros": round(self.density * out_features * in_features), "scaling": self.alpha / rank}

    def factorize(self, weight, rank, stats):
        if weight.dtype in (torch.bfloat16, torch.float16):
            warnings.warn(
                f"sltrain starts from {weight.dtype} weights. An optimizer without float32 masters loses small steps "
                "in them; build the model in float32, and set `bf16=True` of TrainingArguments.",
                stacklevel=2,
            )
        generator, shape = torch.Generator().manual_seed(stats["seed"]), weight.shape
        layout = self.layout(*shape, rank)
        right, rest = drawn_right(generator, rank, shape[1]), None
        values = uniform(generator, shape[1] ** -0.5, layout["nonzeros"])
        if not len(values):
            left = drawn_left(generator, shape[0], rank)
        else:
            left = torch.zeros(shape[0], rank, dtype=torch.float64)
            rest = sparse_matrix(self._places(weight, rank, len(values), generator), values, shape)
            rest = rest.to(weight.device)
        return Factors(left.to(weight.device), right.to(weight.device), None, rest=rest, layout=layout)

    def _places(self, weight, rank, count, generator):
        if self.support == "random":
            return torch.randperm(weight.numel(), generator=generator)[:count].sort().values
        require_finite(weight, "The weight")
        left, right, _ = truncated_svd(weight, rank)
        return largest_entries(weight.double() - left @ right, count).cpu()
