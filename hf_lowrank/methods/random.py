from dataclasses import dataclass
from typing import ClassVar

import torch

from ._start import drawn_left, drawn_right
from .base import Factors, Method, register_method


@register_method("random")
@dataclass(frozen=True)
class RandomFactors(Method):
    r"""Where low-rank training from scratch begins: factors that are drawn, whatever the weight was.

        min over L, R of the training loss,    W = L R,
        R ~ U(-1/sqrt(in), 1/sqrt(in)),    L ~ U(-sqrt(3/r), sqrt(3/r)),    Var W = 1 / (3 in)

    The weight that is replaced says nothing but its shape: this is for a model that was built from a config, and what
    a trained model knows would be lost, so that `from_pretrained` refuses it. W has the variance of a new `nn.Linear`.

    Shapes:
        weight `(out, in)`, left `(out, r)`, right `(r, in)`. Drawn in float64 on the CPU.

    Reference:
        Winata et al., LRT, ICASSP 2020, and Greenformers (thesis, 2021), factorization by design. Differs: the start,
        which keeps the variance; theirs draws both factors as new layers are.
    """

    initialises: ClassVar[bool] = True

    def factorize(self, weight, rank, stats):
        generator = torch.Generator().manual_seed(stats["seed"])
        right = drawn_right(generator, rank, weight.shape[1])
        left = drawn_left(generator, weight.shape[0], rank)
        return Factors(left.to(weight.device), right.to(weight.device), None)
