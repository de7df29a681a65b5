"""A classifier of low rank: every class is a few weights over a basis that all classes share."""

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from ..checks import is_integer, is_number
from ..errors import ConfigError, RankError
from ..linalg import energy_rank, require_finite, singular_energies, truncated_svd


INITS = ("pca", "svd", "random")
TRAINED = ("weights", "basis", "both")
# Where the temperature of contrastive models ends up.
SCALE = 100.0


@strict
class SharedBasisHeadConfig(PreTrainedConfig):
    r"""Configuration of [`SharedBasisHead`]: sizes, and what is trained. [`SharedBasisHead.from_features`] makes one.

    Args:
        num_classes (`int`, defaults to 2): at least 1.
        num_features (`int`, defaults to 512): d, size of an input.
        num_basis (`int`, defaults to 1): K, in `1 .. num_features`.
        train_factors (`str`, defaults to `"weights"`): which factor the loss of the task trains: `"weights"`, A;
            `"basis"`, B; or `"both"`.
        recon_weight (`float`, defaults to 0.1): w, at least 0; with 0 there is no auxiliary loss, and F is not kept.
        normalize (`bool`, defaults to `True`): whether inputs and classes are compared by their angle.
        has_bias (`bool`, defaults to `False`): whether classes have a bias.

    Raises:
        ConfigError: an option that is not allowed.
        RankError: `num_basis` out of range.
    """

    model_type = "shared_basis_head"

    num_classes: int = 2
    num_features: int = 512
    num_basis: int = 1
    train_factors: str = "weights"
    recon_weight: float | int = 0.1
    normalize: bool = True
    has_bias: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.train_factors not in TRAINED:
            raise ConfigError(
                f"`train_factors`={self.train_factors!r} of SharedBasisHeadConfig must be one of {list(TRAINED)}."
            )
        if not is_number(self.recon_weight) or self.recon_weight < 0:
            raise ConfigError(f"`recon_weight`={self.recon_weight!r} of SharedBasisHead must be a number from 0 on.")
        if not is_integer(self.num_basis, 1) or self.num_basis > self.num_features:
            raise RankError(f"`num_basis`={self.num_basis!r} must be an integer in 1..{self.num_features}.")


class SharedBasisHead(PreTrainedModel):
    r"""Logits from class features that share a basis; a new class is a row of numbers, found without training.

        F (classes, d) ~ A B,    logits = tau x^ norm(A B)^T + b,    x^ = x / |x|  (`normalize=True`)
        logits = x (A B)^T + b                                                    (`normalize=False`)
        new class f:  a = f pinv(B)

    The task and the reconstruction of F pull at different factors: with `train="weights"` the loss of the task reaches
    A alone, and `auxiliary_loss` pulls B towards F and A towards few, unlike weights:

        w (|sg(A) B - F|^2 + mean_c |a_c|_1) + w / 100 (sum_{i != j} |cos(A_i, A_j)| + sum |O O^T|),

    A_i columns, O the cosines between different rows of B, sg stops gradients, w = `recon_weight`. It is an ordinary
    module, which takes the place of a classifier, and a model of transformers, which is saved and pushed by itself.

    Args:
        config ([`SharedBasisHeadConfig`]): sizes; the factors are drawn. [`SharedBasisHead.from_features`] and
            [`SharedBasisHead.from_linear`] make a head that knows its classes.

    Shapes:
        input `(..., d)`, logits `(..., classes)`; `weights` `(classes, K)`, `basis` `(K, d)`: K (classes + d) numbers.
        `target` `(classes, d)`, F, is a buffer, and there only where `recon_weight` is above 0; `forget` drops it.

    Reference:
        HOLa, ICCV 2025, https://arxiv.org/abs/2507.15542. Differs: A is least squares for the basis, where centring
        and normalisation leave A B other than F at the start; the head stands alone, without the detector around it.
    """

    config: SharedBasisHeadConfig
    base_model_prefix = "head"
    main_input_name = "features"

    def __init__(self, config):
        super().__init__(config)
        self.weights = nn.Parameter(torch.empty(config.num_classes, config.num_basis))
        self.basis = nn.Parameter(torch.empty(config.num_basis, config.num_features))
        self.logit_scale = nn.Parameter(torch.empty(())) if config.normalize else None
        self.bias = nn.Parameter(torch.empty(config.num_classes)) if config.has_bias else None
        target = torch.empty(config.num_classes, config.num_features) if config.recon_weight > 0 else None
        self.register_buffer("target", target)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if module is not self:
            super()._init_weights(module)
            return
        init.normal_(self.weights, std=self.weights.shape[1] ** -0.5)
        init.normal_(self.basis, std=self.basis.shape[1] ** -0.5)
        if self.logit_scale is not None:
            init.constant_(self.logit_scale, math.log(SCALE))
        if self.bias is not None:
            init.zeros_(self.bias)
        if self.target is not None:
            init.copy_(self.target, self.weights @ self.basis)

    @classmethod
    def from_features(
        cls,
        features,
        num_basis=0.95,
        init="pca",
        train="weights",
        recon_weight=0.1,
        normalize=True,
        scale=SCALE,
        bias=None,
        seed=0,
    ):
        """A head for the classes that `features` describe.

        Args:
            features (`torch.Tensor`): F, `(classes, d)`: text features of the classes, or rows of a classifier.
            num_basis (`int` or `float`, defaults to 0.95): K, in `1 .. min(classes, d)`; or the share of the variance
                (of the squared features, for other starts than `"pca"`) that is kept at least, in (0, 1).
            init (`str`, defaults to `"pca"`): `"pca"`, the principal directions of the centred features; `"svd"`, the
                least error of F, which is zero from its rank on; `"random"`, orthonormal directions. Rows of B have
                norm one, and A is least squares for F, so that A B is as near to F as B allows, centred or not.
            train (`str`, defaults to `"weights"`): as `train_factors` of [`SharedBasisHeadConfig`].
            recon_weight, normalize: as of [`SharedBasisHeadConfig`].
            scale (`float`, defaults to 100.0): tau at the start, above 0; learned. Only with `normalize`.
            bias (`torch.Tensor`, *optional*): b, `(classes,)`.
            seed (`int`, defaults to 0): of `"random"`.

        Returns:
            [`SharedBasisHead`] in dtype and on the device of F; computed in float64, cast once.

        Raises:
            ConfigError: an option that is not allowed, F without classes or features, or a bias of another length.
            RankError: `num_basis` out of range.
            NonFiniteError: F or the bias holds NaN or infinity.
        """
        _check(features, init, train, scale, bias)
        require_finite(features, "`features`")
        if bias is not None:
            require_finite(bias, "`bias`")
        wide = features.detach().double()
        basis = _start(wide, _size(wide, num_basis, init), init, seed)
        head = cls(
            SharedBasisHeadConfig(
                num_classes=len(features),
                num_features=features.shape[1],
                num_basis=len(basis),
                train_factors=train,
                recon_weight=recon_weight,
                normalize=normalize,
                has_bias=bias is not None,
            )
        ).to(features.device, features.dtype)
        with torch.no_grad():
            head.basis.copy_(basis)
            head.weights.copy_(_coefficients(wide, basis))
            if head.target is not None:
                head.target.copy_(features)
            if normalize:
                head.logit_scale.fill_(math.log(scale))
            if bias is not None:
                head.bias.copy_(bias)
        return head

    @classmethod
    def from_linear(cls, linear, num_basis=0.95, init="svd", **options):
        """The head in the place of a linear classifier, whose rows are the features; an LM head's are its tokens.

        Args:
            linear (`torch.nn.Linear`): a classifier or output embedding; what it is tied to stays as it is.
            num_basis, init, options: of `from_features`; inner products, as a linear has, unless `normalize`; and
                `recon_weight=0` unless given, so that F, which is the weight once more, is not stored beside A and B.

        Returns:
            [`SharedBasisHead`], without an auxiliary loss unless `recon_weight` is given.

        Raises:
            ConfigError: something else than a linear; and as `from_features`, as RankError and NonFiniteError.
        """
        if not isinstance(linear, nn.Linear):
            raise ConfigError(f"`linear` must be a torch.nn.Linear, not {type(linear).__name__}.")
        options = {"normalize": False, "recon_weight": 0.0, "bias": linear.bias, **options}
        return cls.from_features(linear.weight, num_basis, init, **options)

    def class_features(self):
        """A B, `(classes, d)`, through which gradients of the task reach what `train` says."""
        weights, basis = self._factors()
        return weights @ basis

    def forward(self, features):
        if not self.config.normalize:
            # Two thin products, as long as there are fewer rows than classes.
            weights, basis = self._factors()
            return nn.functional.linear(nn.functional.linear(features, basis), weights, self.bias)
        classes = nn.functional.normalize(self.class_features(), dim=-1)
        logits = self.logit_scale.exp() * nn.functional.normalize(features, dim=-1) @ classes.T
        return logits if self.bias is None else logits + self.bias

    def auxiliary_loss(self):
        """What to add to the loss of the task, a scalar; the equation is in the documentation of the class.

        Raises:
            ConfigError: there is no F to compare with: `recon_weight` is 0.
        """
        if self.target is None:
            raise ConfigError("There is no auxiliary loss with `recon_weight`=0; give a weight when the head is made.")
        difference = self.weights.detach() @ self.basis - self.target
        fit = difference.square().sum() + self.weights.abs().sum(1).mean()
        between = _cosines(self.basis)
        apart = _cosines(self.weights.T).abs().sum() + (between @ between.T).abs().sum()
        return self.config.recon_weight * (fit + apart / 100)

    def forget(self):
        """Drop F, after training: what is stored are A and B, and there is no auxiliary loss any more."""
        self.target = None
        self.config.recon_weight = 0.0

    @torch.no_grad()
    def add_classes(self, features, bias=None):
        """Append classes by their features, without training; the others' logits stay as they are.

        Parameters are replaced by longer ones: an optimizer that holds them has to be made again.

        Args:
            features (`torch.Tensor`): `(new, d)`.
            bias (`torch.Tensor`, *optional*): `(new,)`, where classes have one; zero by default.

        Returns:
            `torch.Tensor`: the relative error of each new class within the basis, `(new,)`, float64.

        Raises:
            ConfigError: features of another size, or a bias for a head without.
            NonFiniteError: features that hold NaN or infinity.
        """
        if features.ndim != 2 or features.shape[1] != self.basis.shape[1]:
            raise ConfigError(
                f"`features` of shape {tuple(features.shape)} must be (new classes, {self.basis.shape[1]})."
            )
        if bias is not None and (self.bias is None or bias.shape != features.shape[:1]):
            raise ConfigError("`bias` must have an entry for each new class, of a head whose classes have one.")
        require_finite(features, "`features`")
        features = features.detach().to(self.basis.device)
        wide, basis = features.double(), self.basis.double()
        weights = _coefficients(wide, basis)
        self.weights = _extended(self.weights, weights)
        if self.target is not None:
            self.target = torch.cat([self.target, features.to(self.target.dtype)])
        if self.bias is not None:
            self.bias = _extended(self.bias, self.bias.new_zeros(len(features)) if bias is None else bias)
        self.config.num_classes = len(self.weights)
        return (wide - weights @ basis).norm(dim=1) / wide.norm(dim=1).clamp(min=torch.finfo(wide.dtype).tiny)

    def _factors(self):
        trained = self.config.train_factors
        weights = self.weights.detach() if trained == "basis" else self.weights
        return weights, self.basis.detach() if trained == "weights" else self.basis

    def extra_repr(self):
        classes, basis = self.weights.shape
        return f"num_classes={classes}, num_basis={basis}, train={self.config.train_factors!r}"


def _check(features, init, train, scale, bias):
    if not isinstance(features, torch.Tensor) or features.ndim != 2 or not features.is_floating_point():
        raise ConfigError("`features` of SharedBasisHead must be a floating-point matrix (classes, d).")
    if not features.numel():
        raise ConfigError(
            f"`features` of shape {tuple(features.shape)} of SharedBasisHead must have at least one class and one "
            "feature; further classes are added with `add_classes`."
        )
    if bias is not None and not (isinstance(bias, torch.Tensor) and bias.shape == features.shape[:1]):
        raise ConfigError(
            f"`bias` of SharedBasisHead must be a tensor of {len(features)} numbers, one for each class; got "
            f"{tuple(bias.shape) if isinstance(bias, torch.Tensor) else bias!r:.200}."
        )
    if train not in TRAINED:
        raise ConfigError(f"`train`={train!r} of SharedBasisHead must be one of {list(TRAINED)}.")
    if init not in INITS:
        raise ConfigError(f"`init`={init!r} of SharedBasisHead must be one of {list(INITS)}.")
    if not is_number(scale) or scale <= 0:
        raise ConfigError(f"`scale`={scale!r} of SharedBasisHead must be a number above 0.")


def _size(features, num_basis, init):
    """K, from a number or a share of the variance."""
    limit = min(features.shape)
    if isinstance(num_basis, float) and 0 < num_basis < 1:
        energies = singular_energies(features - features.mean(0) if init == "pca" else features)
        # Of features that are all alike, nothing varies.
        return max(1, energy_rank(energies, num_basis))
    if not is_integer(num_basis, 1) or num_basis > limit:
        raise RankError(
            f"`num_basis`={num_basis!r} must be an integer in 1..{limit} = min(classes, d) of the features "
            f"{tuple(features.shape)}, or a share of their variance in (0, 1)."
        )
    return num_basis


def _start(features, size, init, seed):
    """B with rows of norm one, `(K, d)`, float64."""
    if init == "random":
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(features.shape[1], size, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(directions.to(features.device)).Q.T
    _, right, _ = truncated_svd(features - features.mean(0) if init == "pca" else features, size)
    # Rows are orthogonal, of whatever norm; where nothing is left to describe, a direction beside the others.
    return torch.linalg.qr(right.T).Q.T


def _coefficients(features, basis):
    """Least squares: the weights whose product with `basis` is nearest to `features`."""
    return features @ torch.linalg.pinv(basis.double())


def _cosines(rows):
    """Cosines between different rows, with a diagonal of zeros."""
    rows = nn.functional.normalize(rows, dim=-1)
    cosines = rows @ rows.T
    return cosines - cosines.diagonal().diag_embed()


def _extended(parameter, more):
    """`parameter` with further rows, trained as it was."""
    joined = torch.cat([parameter.detach(), more.to(parameter)])
    return nn.Parameter(joined, requires_grad=parameter.requires_grad)
