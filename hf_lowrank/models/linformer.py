"""Linformer: an encoder whose keys and values are projected along the sequence, so that attention is linear in it."""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import BertLayer, BertSelfAttention, eager_attention_forward

from ..checks import is_integer
from ..errors import ConfigError


SHARINGS = ("none", "headwise", "key_value", "layerwise")
STARTS = ("normal", "strided")


@strict
class LinformerConfig(BertConfig):
    r"""Configuration of [`LinformerModel`]: that of BERT, and how sequences are projected.

    Args:
        projected_length (`int` or `list[int]`, defaults to 128): k, the number of projected keys and values, in
            `1 .. max_position_embeddings`; a list has one a layer (not with `sharing="layerwise"`).
        sharing (`str`, defaults to `"layerwise"`): which keys and values have a projection in common. `"none"`: each
            head of each layer has one for keys and one for values; `"headwise"`: the heads of a layer share both;
            `"key_value"`: one for all of a layer; `"layerwise"`: one for the whole model.
        projection_start (`str`, defaults to `"normal"`): `"normal"`, with the variance of Xavier's; or `"strided"`:
            the i-th sum is of the tokens i, i + k, i + 2 k, ..., which leaves sequences of up to k tokens as they are.
            With it, a BERT checkpoint goes on where it was.
        max_position_embeddings (`int`, defaults to 512): the longest input, n; longer ones are refused.
        kwargs: everything else as in `transformers.BertConfig`; decoders are refused.

    Raises:
        ConfigError: a value that is not allowed.
    """

    model_type = "linformer"

    projected_length: int | list[int] = 128
    sharing: str = "layerwise"
    projection_start: str = "normal"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name, allowed in (("sharing", SHARINGS), ("projection_start", STARTS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"`{name}`={getattr(self, name)!r} of LinformerConfig must be one of {list(allowed)}."
                )
        if self.is_decoder or self.add_cross_attention:
            raise ConfigError(
                "Linformer is an encoder: a projected key holds tokens of the whole sequence, later ones too. Leave "
                "`is_decoder` and `add_cross_attention` False."
            )
        several, limit = isinstance(self.projected_length, list), self.max_position_embeddings
        lengths = self.projected_length if several else [self.projected_length]
        if several and (self.sharing == "layerwise" or len(lengths) != self.num_hidden_layers):
            raise ConfigError(
                f"`projected_length`={lengths} must have one entry for each of {self.num_hidden_layers} layers, which "
                "cannot have one projection in common; give one number, or another `sharing`."
            )
        if not all(is_integer(length, 1) and length <= limit for length in lengths):
            raise ConfigError(
                f"`projected_length`={self.projected_length} must be in 1..{limit}, the longest input "
                "(`max_position_embeddings`)."
            )

    def projected_length_of(self, layer):
        """k of a layer, by its number."""
        return self.projected_length[layer] if isinstance(self.projected_length, list) else self.projected_length


class SequenceProjection(nn.Module):
    r"""Sums of the rows of a sequence, by weights that belong to their places.

        y_i = sum_t E_it x_t,    E `(k, n)`, or one a head

    A shorter sequence meets the first columns of E, as if it were filled up with zeros.

    Args:
        projected_length (`int`): k.
        length (`int`): n.
        heads (`int`, *optional*): as many projections; by default one for all.

    Shapes:
        input `(batch, heads, t, d)` with t up to n, output `(batch, heads, k, d)`; `weight` `(k, n)` or
        `(heads, k, n)`.
    """

    def __init__(self, projected_length, length, heads=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*([] if heads is None else [heads]), projected_length, length))

    def forward(self, rows):
        return self.weight[..., : rows.shape[-2]] @ rows

    def extra_repr(self):
        return f"shape={tuple(self.weight.shape)}"


class LinformerSelfAttention(BertSelfAttention):
    r"""Attention over k projected keys and values in the place of all n.

        softmax(Q (E K)^T / sqrt(d)) F V,    E, F `(k, n)`

    Rows of padding are zero before they are projected, so that no sum holds them. Of a sequence of t < k tokens the
    first t sums are attended to: more would only say again what these say.

    Args:
        config ([`LinformerConfig`]): sizes and sharing.
        layer_idx (`int`): the number of the layer.
        projection ([`SequenceProjection`], *optional*): that of the whole model, which belongs to someone else.
    """

    def __init__(self, config, layer_idx, projection=None):
        super().__init__(config, layer_idx=layer_idx)
        length = config.max_position_embeddings
        sizes = config.projected_length_of(layer_idx), length, self.num_attention_heads
        sizes = sizes if config.sharing == "none" else sizes[:2]
        own = config.sharing in ("none", "headwise")
        self.key_projection = SequenceProjection(*sizes) if projection is None else None
        self.value_projection = SequenceProjection(*sizes) if own else None
        # In a tuple, so that it is no child: the model stores it once.
        self.borrowed = (projection,)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        query = self.query(hidden_states).view(shape).transpose(1, 2)
        projection = self.borrowed[0] if self.key_projection is None else self.key_projection
        projected = []
        for linear, own in ((self.key, projection), (self.value, self.value_projection or projection)):
            rows = linear(hidden_states)
            if attention_mask is not None:
                rows = rows.masked_fill(~attention_mask[..., None], 0)
            projected.append(own(rows.view(shape).transpose(1, 2)))
        mask = self._sums_to_attend(query, projected[0].shape[2], attention_mask)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout.p if self.training else 0.0
        output, weights = attend(self, query, *projected, mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return output.reshape(*hidden_states.shape[:-1], -1).contiguous(), weights

    @staticmethod
    def _sums_to_attend(query, sums, attention_mask):
        """What to add to the scores `(batch, heads, t, sums)`: sums beyond the number of tokens are no keys."""
        length = query.shape[2]
        if attention_mask is None and length >= sums:
            return None
        tokens = query.new_full((len(query),), length) if attention_mask is None else attention_mask.sum(1)
        # One is left where there is padding alone: a softmax over nothing is not a number.
        beyond = torch.arange(sums, device=query.device) >= tokens.clamp(min=1)[:, None]
        return query.new_zeros(beyond.shape).masked_fill(beyond, torch.finfo(query.dtype).min)[:, None, None]


class LinformerModel(BertModel):
    r"""BERT with [`LinformerSelfAttention`]: time and memory of attention grow with n k, not with n^2.

    Everything else, parameter names included, is BERT's: `LinformerModel.from_pretrained` takes a BERT checkpoint
    with `config=LinformerConfig(...)` of the same sizes, and starts the projections anew. With k = n and E = F = 1 it
    is BERT, as it is with the strided start for every input of up to k tokens. Padding contributes nothing: an input
    gives what it gives when it is filled up to any length.

    Args:
        config ([`LinformerConfig`]): sizes and sharing.
        add_pooling_layer (`bool`, defaults to `True`): whether there is a `pooler_output`.

    Shapes:
        `input_ids` `(batch, t)`, t up to `max_position_embeddings`; `last_hidden_state` `(batch, t, hidden)`;
        attentions `(batch, heads, t, k)`.

    Raises:
        ConfigError: a longer input, or a mask that is not `(batch, t)`.

    Reference:
        Wang et al., "Linformer: Self-Attention with Linear Complexity", 2020, https://arxiv.org/abs/2006.04768, for
        inputs of n tokens. Differs: shorter ones, padding, and fewer tokens than k are ours, as are both starts of the
        projections: `"normal"` is reconstructed, `"strided"` is not of the paper.
    """

    config: LinformerConfig
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_record_outputs = {"hidden_states": BertLayer, "attentions": LinformerSelfAttention}

    def __init__(self, config, add_pooling_layer=True):
        super().__init__(config, add_pooling_layer)
        sizes = config.projected_length, config.max_position_embeddings
        self.sequence_projection = SequenceProjection(*sizes) if config.sharing == "layerwise" else None
        for index, layer in enumerate(self.encoder.layer):
            layer.attention.self = LinformerSelfAttention(config, index, self.sequence_projection)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if not isinstance(module, SequenceProjection):
            return
        rows, length = module.weight.shape[-2:]
        if self.config.projection_start == "normal":
            init.normal_(module.weight, std=(2 / (rows + length)) ** 0.5)
        else:
            meets = torch.arange(length) % rows == torch.arange(rows)[:, None]
            init.copy_(module.weight, meets.to(module.weight).expand_as(module.weight))

    def _create_attention_masks(self, attention_mask, encoder_attention_mask, embedding_output, **kwargs):
        batch, length = embedding_output.shape[:2]
        if attention_mask is None:
            return None, None
        if attention_mask.shape != (batch, length):
            raise ConfigError(
                f"`attention_mask` of shape {tuple(attention_mask.shape)} must be {(batch, length)}, one entry a "
                "token: which token sees which cannot be said to projected keys."
            )
        return attention_mask.bool(), None

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, position_ids=None, **kwargs):
        given = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
        limit = self.config.max_position_embeddings
        if given is not None and given.shape[1] > limit:
            raise ConfigError(
                f"The input has {given.shape[1]} tokens, and the projections are for {limit}; truncate it, or build "
                "the model with a larger `max_position_embeddings`."
            )
        return super().forward(input_ids, attention_mask, token_type_ids, position_ids, **kwargs)


class LinformerForMaskedLM(BertForMaskedLM):
    """[`LinformerModel`] with BERT's head for masked tokens, tied to its embeddings.

    Args:
        config ([`LinformerConfig`]): sizes and sharing.
    """

    config: LinformerConfig

    def __init__(self, config):
        super().__init__(config)
        self.bert = LinformerModel(config, add_pooling_layer=False)
        self.post_init()


class LinformerForSequenceClassification(BertForSequenceClassification):
    """[`LinformerModel`] with a classifier on the first token, trained as any other by `Trainer`.

    Args:
        config ([`LinformerConfig`]): sizes, sharing and `num_labels`.
    """

    config: LinformerConfig

    def __init__(self, config):
        super().__init__(config)
        self.bert = LinformerModel(config)
        self.post_init()
