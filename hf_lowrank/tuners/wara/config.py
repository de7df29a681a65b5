import warnings
from dataclasses import dataclass, field
from itertools import product

from ...checks import check_boolean, is_number
from ...errors import ConfigError
from ...linalg import band_names, wavelet_filters
from .._config import TunerConfig, check_rank_option


@dataclass
class WaraConfig(TunerConfig):
    r"""Low-rank updates in a wavelet domain: each pair of an output band and an input band has a rank of its own.

        W' = W + s sum_oi g_oi T_o^T B_oi A_oi T_i,    s = lora_alpha / max r_oi

    T_b are the rows of an orthonormal wavelet transform, of the outputs or of the inputs, that make up band b. The
    transform goes over the numbering of features, and the update merges into the weight. The bands are called `"L"`
    and, from fine to coarse, `"H1"` to `"H<levels>"`. B starts at zero, A as LoRA's, so that an untrained adapter
    changes nothing.

    With b = levels + 1 bands and one rank everywhere, a weight has about `b r (out + in)` new parameters: the default
    (two bands, r = 4) has those of LoRA at r = 8. The update is exactly a LoRA update of rank `sum r_oi`
    ([`to_lora`] writes it as one), whose factors are lifted from the bands once a forward pass. When generating token
    by token that lifting is a large part of the adapter's time: merge, or convert.

    Args:
        r (`int`, defaults to 4): rank of every pair of bands, 1 or more.
        wavelet (`str`, defaults to `"haar"`): an orthogonal wavelet of PyWavelets, such as `"db4"` or `"sym8"`.
        levels (`int`, defaults to 1): how often the low band is split again. Any size may be split: of an odd number
            of entries the last goes to the low band as it is.
        subband_ranks (`dict[str, int]`, *optional*): ranks of single pairs, `{"L:H1": 2}` (output band, colon, input
            band); others keep `r`, and 0 leaves a pair out.
        rank_pattern (`dict[str, int | dict]`, *optional*): module name, dotted suffix or regular expression -> its own
            `r`, or its own `subband_ranks`.
        subband_gains (`dict[str, float]`, *optional*): fixed factors g of single pairs, 1 for the others.
        share_subbands (`bool`, defaults to `False`): one B and one A for all bands,
            `W' = W + s T^T blockdiag(g_L B A, g_H B A) T`, with about `r (out + in) / 2` parameters and an update of
            rank 2 r. Needs `levels=1`. With the two taps of `"haar"` the update is the Kronecker product of B A and
            `[[g_L + g_H, g_L - g_H], [g_L - g_H, g_L + g_H]] / 2` (but for the last feature of an odd side). With
            equal gains that is a multiple of the identity, with opposite ones of the exchange of the two: the wavelet
            cancels, even and odd features get the same LoRA, and a warning says so.
        lora_alpha (`float`, defaults to 4): above 0; with `use_rslora`, s = lora_alpha / sqrt(max r_oi).
        mode (`str`, defaults to `"weight"`): the only one. A transform over tokens (`"grid"`) is refused: shared by
            all bands it is LoRA, as both are linear and commute; with a gain or an adapter a band it cannot be merged
            into a weight, needs the shape of the grid, and lets tokens of a causal model see later ones.

    All other arguments are those of `peft.LoraConfig`: `lora_dropout`, `use_rslora`, `target_modules` (by default
    every linear but the output head; a factorized layer counts as one), `exclude_modules`, `alpha_pattern`, `bias`
    (`"none"`, `"all"`, `"wara_only"`), `modules_to_save`, `layers_to_transform`, `layers_pattern`.

    Raises:
        ConfigError: a value that is not allowed, or PyWavelets is missing.

    Reference:
        WaRA, 2506.24092, reconstructed: the first version's figure and the second's abstract were read, the authors'
        code was not. Wavelet, levels, scale and init are our choice. Differs: the first version's one pair of factors
        for all bands is `share_subbands`; a rank for each pair of bands is ours. Not here: its frozen SVD basis
        (Tiny-WaRA).
    """

    r: int = 4
    lora_alpha: float = 4
    wavelet: str = "haar"
    levels: int = 1
    subband_ranks: dict = field(default_factory=dict)
    subband_gains: dict = field(default_factory=dict)
    share_subbands: bool = False
    mode: str = "weight"

    def __post_init__(self):
        super().__post_init__()
        if self.mode == "grid":
            raise ConfigError(
                "`mode`='grid' is not offered. One adapter shared by all bands of the tokens is equivalent to LoRA "
                "(use peft.LoraConfig); an adapter or a gain a band cannot be merged, and shows tokens of a causal "
                "model later ones. Use mode='weight', which transforms features."
            )
        if self.mode != "weight":
            raise ConfigError(f"`mode`={self.mode!r} must be 'weight'.")
        check_rank_option("`levels`", self.levels)
        if not isinstance(self.wavelet, str):
            raise ConfigError(
                f"`wavelet`={self.wavelet!r} must be the name of a wavelet of PyWavelets, such as 'db4'."
            )
        low, _ = wavelet_filters(self.wavelet)
        check_boolean("share_subbands", self.share_subbands)
        self._check_ranks("`subband_ranks`", self.subband_ranks)
        for pattern, value in self.rank_pattern.items():
            name = f"`rank_pattern`[{pattern!r}]"
            if isinstance(value, dict):
                self._check_ranks(name, value)
            else:
                check_rank_option(name, value)
        self._check_pairs("`subband_gains`", self.subband_gains)
        for pair, gain in self.subband_gains.items():
            if not is_number(gain) or gain == 0:
                raise ConfigError(
                    f"`subband_gains`[{pair!r}]={gain!r} must be a number other than 0; to leave a pair out, give it "
                    "rank 0 in `subband_ranks`."
                )
        if self.share_subbands:
            self._check_shared()
            if len(low) == 2 and len({abs(self.gain(pair)) for pair in self.pairs}) == 1:
                warnings.warn(
                    f"`share_subbands`=True with the two taps of {self.wavelet!r} is a LoRA in disguise: the update "
                    "is a multiple of the Kronecker product of B A with the 2 x 2 identity (or, where the gains are "
                    "opposite, with the exchange of even and odd features), and the wavelet cancels. A longer one "
                    "('db2'), `subband_gains` of different size, or share_subbands=False does not.",
                    stacklevel=3,
                )

    @property
    def pairs(self):
        """`(output band, input band)` of all pairs that may have a rank, in the order of `band_names`."""
        bands = band_names(self.levels)
        return [(band, band) for band in bands] if self.share_subbands else list(product(bands, bands))

    def ranks_for(self, module_name):
        """`{(output band, input band): rank}` of a module, without pairs of rank 0."""
        own = self.rank_for(module_name)
        rank, single = (self.r, own) if isinstance(own, dict) else (own, self.subband_ranks)
        ranks = {pair: single.get(":".join(pair), rank) for pair in self.pairs}
        return {pair: rank for pair, rank in ranks.items() if rank}

    def gain(self, pair):
        """The gain of a pair of bands."""
        return self.subband_gains.get(":".join(pair), 1.0)

    def _check_pairs(self, name, value):
        allowed = [":".join(pair) for pair in self.pairs]
        if not isinstance(value, dict):
            raise ConfigError(f"{name}={value!r} must be a dict whose keys are among {allowed}.")
        unknown = [pair for pair in value if pair not in allowed]
        if unknown:
            raise ConfigError(f"{name} has the keys {unknown}; output band, colon, input band are {allowed} here.")

    def _check_ranks(self, name, value):
        self._check_pairs(name, value)
        for pair, rank in value.items():
            check_rank_option(f"{name}[{pair!r}]", rank, least=0)
        if len(value) == len(self.pairs) and not any(value.values()):
            raise ConfigError(f"{name} leaves out every pair of bands; give at least one a rank above 0.")

    def _check_shared(self):
        if self.levels != 1:
            raise ConfigError(
                f"`levels`={self.levels} with `share_subbands`=True: bands of one size can share factors, which two "
                "bands have; use levels=1."
            )
        if self.subband_ranks or any(isinstance(rank, dict) for rank in self.rank_pattern.values()):
            raise ConfigError(
                "`subband_ranks`, also within `rank_pattern`, contradicts `share_subbands`=True: what is shared has "
                "one rank; give it as `r`, or integers in `rank_pattern`."
            )
