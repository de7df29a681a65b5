"""Train a small part of a factorized model: its singular values, or its factors."""

import logging

from torch import nn

from ...errors import ConfigError, TargetError
from ...formats import FormatLinear, LowRankLinear, SharedBasisLinear
from ...linalg import balanced
from ...rewrite import exact_factors, replace_factors
from . import require_peft


logger = logging.getLogger(__name__)

PARTS = ("singular_values", "factors", "left", "right", "biases")


def train_only(model, part="singular_values", adapter_name="default"):
    ...
