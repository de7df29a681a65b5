import math

import torch
from torch import nn

from ...errors import RankError
from ...linalg import band_names, band_sizes, synthesize, wavelet_filters
from .._layer import FactorTunerLinear, linear_shape


SHARED = "shared"


class WaraLinear(FactorTunerLinear):
    r"""A linear layer with WaRA adapters; the update is that of [`WaraConfig`].

    The parameters of a band are stacked, one row of wavelet coefficients for each unit of rank, so that a side is
    lifted by one synthesis:

        right = cat(A_oi T_i over i, o),    left = s cat(g_oi T_o^T B_oi over i, o)

    Shapes:
        `wara_A[adapter][i]` `(sum_o r_oi, size of i)`, `wara_B[adapter][o]` `(sum_i r_oi, size of o)`; or one table a
        side, `(r, ceil(in / 2))` and `(r, ceil(out / 2))`, called `"shared"`, of which a smaller band takes the first
        columns.
    """

    adapter_layer_names = ("wara_A", "wara_B")
    other_param_names = (*FactorTunerLinear.other_param_names, "wara_layout")

    def __init__(self, base_layer):
        super().__init__(base_layer)
        self.wara_A = nn.ModuleDict()
        self.wara_B = nn.ModuleDict()
        self.wara_layout = {}

    @staticmethod
    def check(module_name, base, config):
        """Refuse ranks and levels that a module cannot have.

        Raises:
            TargetError: `base` is no linear layer.
            ConfigError: a side is too short for `levels`.
            RankError: a rank exceeds what a pair of bands can have.
        """
        outputs, inputs = (band_sizes(size, config.levels) for size in linear_shape(base))
        for (o, i), rank in config.ranks_for(module_name).items():
            if rank > min(outputs[o], inputs[i]):
                raise RankError(
                    f"rank {rank} of the bands {o}:{i} exceeds min(out, in) of their {outputs[o]} x {inputs[i]} "
                    "coefficients; lower it in `r`, `subband_ranks` or `rank_pattern`, or use fewer `levels`."
                )

    def update_layer(self, adapter_name, module_name, config):
        """Add an adapter, or make it anew; `check` has to have passed."""
        layout = Layout(config, module_name, self.out_features, self.in_features)
        self.wara_layout[adapter_name] = layout
        self.wara_A[adapter_name] = _empty(layout.shapes(1))
        self.wara_B[adapter_name] = _empty(layout.shapes(0))
        for table in self.wara_A[adapter_name].values():
            nn.init.kaiming_uniform_(table, a=math.sqrt(5))
        for table in self.wara_B[adapter_name].values():
            nn.init.zeros_(table)
        self.scaling[adapter_name] = config.scale_for(module_name, max(layout.ranks.values()))
        self.dropout[adapter_name] = config.lora_dropout
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def factors(self, adapter):
        layout, scale = self.wara_layout[adapter], self.scaling[adapter]
        right = layout.lift(self.wara_A[adapter], layout.inputs)
        left = layout.lift(self.wara_B[adapter], layout.outputs)  # (R, out), by output band
        return layout.ordered(left, scale).T, right


class Layout:
    """Where the rows of an adapter's tables belong. Holds numbers only.

    Args:
        config ([`WaraConfig`]): ranks, gains and transform.
        module_name (`str`): the module's full name.
        out_features (`int`): rows of its weight.
        in_features (`int`): columns of its weight.
    """

    def __init__(self, config, module_name, out_features, in_features):
        self.filters = wavelet_filters(config.wavelet)
        self.shared = config.share_subbands
        self.ranks = config.ranks_for(module_name)
        self.outputs = band_sizes(out_features, config.levels)
        self.inputs = band_sizes(in_features, config.levels)
        bands = band_names(config.levels)
        by_output = sorted(self.ranks, key=lambda pair: (bands.index(pair[0]), bands.index(pair[1])))
        by_input = sorted(self.ranks, key=lambda pair: (bands.index(pair[1]), bands.index(pair[0])))
        self.blocks = [self.ranks[pair] for pair in by_output]
        self.order = [by_output.index(pair) for pair in by_input]
        self.gains = [config.gain(pair) for pair in by_input]

    def shapes(self, side):
        """Shapes of the tables of the outputs (`side` 0) or the inputs (1), by name."""
        sizes = (self.outputs, self.inputs)[side]
        if self.shared:
            return {SHARED: (max(self.ranks.values()), sizes["L"])}
        rows = {band: sum(rank for pair, rank in self.ranks.items() if pair[side] == band) for band in sizes}
        return {band: (rows[band], sizes[band]) for band in sizes if rows[band]}

    def lift(self, tables, sizes):
        """The rows of `tables` as vectors, by band."""
        if self.shared:
            bands = [tables[SHARED][:, :size] for size in sizes.values()]
        else:
            like = next(iter(tables.values()))
            bands = [tables[band] if band in tables else like.new_empty(0, size) for band, size in sizes.items()]
        return synthesize(bands, self.filters, sum(sizes.values()))

    def ordered(self, rows, scale):
        """Rows by output band as rows by input band, times `scale` and the gain of their pair."""
        gain = self.gains[0]
        if any(other != gain for other in self.gains):
            blocks = rows.split(self.blocks)
            return torch.cat([blocks[k] * (scale * g) for k, g in zip(self.order, self.gains, strict=True)])
        if self.order != sorted(self.order):
            blocks = rows.split(self.blocks)
            rows = torch.cat([blocks[k] for k in self.order])
        return rows * (scale * gain)


def _empty(shapes):
    return nn.ParameterDict({name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()})
