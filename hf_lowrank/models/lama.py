"""LAMA: pooling by many attention heads, each with an affinity of rank one, over any encoder."""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from ..checks import check_choice, check_integer
from ..errors import ConfigError


CONTEXTS = ("learned", "mean", "cls", "last")


@strict
class LamaConfig(PreTrainedConfig):
    r"""Configuration of [`LamaModel`]: the encoder, and how its outputs are pooled.

    Args:
        encoder (`PreTrainedConfig` or `dict`, *optional*): of any model that `AutoModel` knows and that gives
            `last_hidden_state`; without, a bidirectional GRU over word embeddings.
        num_heads (`int`, defaults to 8): attention heads of the pooler, at least 1.
        context (`str`, defaults to `"learned"`): as of [`LamaPooler`].
        l2_norm (`bool`, defaults to `True`): as of [`LamaPooler`].
        dropout (`float`, defaults to 0.1): on embeddings of the GRU and on what is pooled, in [0, 1).
        vocab_size (`int`, defaults to 30522), embedding_size (`int`, defaults to 128), hidden_size (`int`, defaults to
            128), num_hidden_layers (`int`, defaults to 1): of the GRU; `hidden_size` is that of one direction.
        pad_token_id (`int`, defaults to 0): the token whose embedding the GRU keeps at zero; `None` for none of them.

    Raises:
        ConfigError: a value that is not allowed.
    """

    model_type = "lama"
    sub_configs_defaults = {"encoder": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True)}

    encoder: PreTrainedConfig | dict | None = None
    num_heads: int = 8
    context: str = "learned"
    l2_norm: bool = True
    dropout: float | int = 0.1
    vocab_size: int = 30522
    embedding_size: int = 128
    hidden_size: int = 128
    num_hidden_layers: int = 1
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_pooler(self.num_heads, self.context)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"`dropout`={self.dropout!r} of LamaConfig must be in [0, 1).")
        if self.encoder is not None and getattr(self.encoder, "is_encoder_decoder", False):
            raise ConfigError(
                f"`encoder` is a {self.encoder.model_type!r} with a decoder; LAMA pools one sequence of states, "
                "so give the configuration of an encoder, or of a decoder alone."
            )

    @property
    def features(self):
        """Size of a hidden state that is pooled."""
        return 2 * self.hidden_size if self.encoder is None else self.encoder.get_text_config().hidden_size


def check_pooler(num_heads, context):
    """Refuse what is no number of heads, or no context."""
    check_integer("num_heads", num_heads, 1, "LAMA")
    check_choice("context", context, CONTEXTS, "LAMA")


def check_mask(mask):
    """Refuse a sequence of padding only, of which there is no state to pool."""
    if not torch.compiler.is_compiling() and not mask.any(1).all():
        raise ConfigError("`attention_mask` has a sequence that is all padding, of which nothing can be pooled.")


class LamaPooler(nn.Module):
    r"""Several weighted sums of hidden states; the weights of a head are an affinity of rank one with a context.

        f_t = (P^T c) * (Q^T h_t),    with `l2_norm` f_t / |f_t|,    A = softmax_t(tanh(f)),    M = A H

    `*` is elementwise, over heads: p_i^T c q_i^T h is bilinear in c and h, with a matrix of rank one. The context c
    is learned, or taken from the sequence. **With the learned one P says nothing**: P^T c is one number a head, and
    the pooler is that with Q diag(P^T c) in the place of Q and 1 in the place of P^T c. Only a context that depends on
    the input gives P a meaning; both are here for comparison.

    Args:
        features (`int`): d, size of a hidden state.
        num_heads (`int`, defaults to 8): at least 1.
        context (`str`, defaults to `"learned"`): `"learned"`, a parameter; `"mean"`, `"cls"` or `"last"`: the mean,
            the first or the last of the hidden states that are no padding.
        l2_norm (`bool`, defaults to `True`): whether f_t, over the heads, is brought to norm one.

    Shapes:
        hidden states `(batch, t, d)`, mask `(batch, t)`; `left` (P) and `right` (Q) `(d, heads)`, `context` `(d,)`.
        Numbers: 2 d heads, and d where the context is learned.

    Returns:
        `(pooled, attention)`: `(batch, heads * d)` and `(batch, heads, t)`, whose rows sum to one, without padding.

    Raises:
        ConfigError: a value that is not allowed, or a sequence that is all padding.

    Reference:
        Mehta et al., "Low Rank Factorization for Compact Multi-Head Self-Attention", 2019,
        https://arxiv.org/abs/1912.00835; from memory. Over what the norm is taken is reconstructed, and so is the
        start; contexts of the input are ours, since what the paper's c is has not been confirmed.
    """

    def __init__(self, features, num_heads=8, context="learned", l2_norm=True):
        super().__init__()
        check_pooler(num_heads, context)
        self.kind, self.l2_norm = context, l2_norm
        self.left = nn.Parameter(torch.empty(features, num_heads))
        self.right = nn.Parameter(torch.empty(features, num_heads))
        self.context = nn.Parameter(torch.empty(features)) if context == "learned" else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Draw P, Q and c so that f has entries of about one for hidden states that have."""
        for matrix in (self.left, self.right):
            init.normal_(matrix, std=matrix.shape[0] ** -0.5)
        if self.context is not None:
            init.normal_(self.context)

    def forward(self, hidden_states, attention_mask=None):
        if attention_mask is None:
            attention_mask = torch.ones(hidden_states.shape[:2], device=hidden_states.device)
        mask = attention_mask.bool()
        check_mask(mask)
        affinity = (self._context(hidden_states, mask) @ self.left).unsqueeze(-2) * (hidden_states @ self.right)
        if self.l2_norm:
            affinity = nn.functional.normalize(affinity, dim=-1)
        scores = affinity.tanh().masked_fill(~mask[..., None], -torch.inf)
        attention = scores.softmax(dim=1).transpose(1, 2)
        return (attention @ hidden_states).flatten(1), attention

    def _context(self, hidden_states, mask):
        """c, `(d,)` or `(batch, d)`."""
        if self.kind == "learned":
            return self.context
        if self.kind == "mean":
            # Half precision has not all lengths as numbers, and may not hold the sum.
            wide = torch.promote_types(hidden_states.dtype, torch.float32)
            total = hidden_states.masked_fill(~mask[..., None], 0).sum(1, dtype=wide)
            return (total / mask.sum(1, keepdim=True)).to(hidden_states.dtype)
        places = torch.arange(mask.shape[1], device=mask.device)
        if self.kind == "cls":
            at = torch.where(mask, places, len(places)).amin(1)
        else:
            at = torch.where(mask, places, -1).amax(1)
        return hidden_states[torch.arange(len(at), device=at.device), at]

    def extra_repr(self):
        return f"features={self.left.shape[0]}, num_heads={self.left.shape[1]}, context={self.kind!r}"


class RecurrentEncoder(nn.Module):
    """Word embeddings and a bidirectional GRU over the tokens that are no padding, wherever that stands.

    Args:
        config ([`LamaConfig`]): sizes.

    Raises:
        ConfigError: a sequence that is all padding.
    """

    supports_gradient_checkpointing = False

    def __init__(self, config):
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id)
        self.dropout = nn.Dropout(config.dropout)
        self.recurrent = nn.GRU(
            config.embedding_size, config.hidden_size, config.num_hidden_layers, batch_first=True, bidirectional=True
        )

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        rows = self.dropout(self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds)
        if attention_mask is None:
            return BaseModelOutput(self.recurrent(rows)[0])
        mask = attention_mask.bool()
        check_mask(mask)
        # Real tokens first, in their order: packing knows of padding at the end only.
        order = (~mask).long().argsort(dim=1, stable=True)[..., None]
        packed = nn.utils.rnn.pack_padded_sequence(
            rows.gather(1, order.expand_as(rows)), mask.sum(1).cpu(), batch_first=True, enforce_sorted=False
        )
        states, _ = nn.utils.rnn.pad_packed_sequence(
            self.recurrent(packed)[0], batch_first=True, total_length=rows.shape[1]
        )
        return BaseModelOutput(torch.zeros_like(states).scatter(1, order.expand_as(states), states))


class LamaPreTrainedModel(PreTrainedModel):
    """What the LAMA models have in common.

    Args:
        config ([`LamaConfig`]): encoder and pooler.
    """

    config: LamaConfig
    base_model_prefix = "lama"
    # The loss is a mean over the batch, whatever the number of items: `Trainer` is to divide it between batches.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @property
    def supports_gradient_checkpointing(self):
        """Whether the encoder does; the GRU does not."""
        encoder = getattr(self.base_model, "encoder", None)
        return getattr(encoder, "supports_gradient_checkpointing", False)

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, LamaPooler):
            module.reset_parameters()
        elif isinstance(module, nn.GRU):
            bound = module.hidden_size**-0.5
            for name, parameter in module.named_parameters():
                if "weight_hh" in name:
                    init.orthogonal_(parameter)
                else:
                    init.uniform_(parameter, -bound, bound)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=module.embedding_dim**-0.5)
            if module.padding_idx is not None:
                init.zeros_(module.weight[module.padding_idx])
        else:
            super()._init_weights(module)

    @classmethod
    def from_encoder(cls, pretrained_model_name_or_path, **options):
        """A model with a pre-trained encoder and a new pooler.

        Args:
            pretrained_model_name_or_path (`str`): of the encoder, a folder or a repository on the Hub.
            options: of [`LamaConfig`]; `dtype`, `revision` and `token` are for the encoder.

        Returns:
            A `LamaModel` or `LamaForSequenceClassification`.

        Raises:
            ConfigError: a factorized or quantized encoder.
        """
        loading = {key: options.pop(key) for key in ("dtype", "revision", "token") if key in options}
        encoder = AutoModel.from_pretrained(pretrained_model_name_or_path, **loading)
        if getattr(encoder, "hf_quantizer", None) is not None:
            raise ConfigError(
                f"{pretrained_model_name_or_path!r} is factorized or quantized, which the configuration of an encoder "
                "inside another model cannot say; start from the dense encoder, and factorize the whole afterwards."
            )
        model = cls(LamaConfig(encoder=encoder.config, **options)).to(encoder.dtype)
        model.base_model.encoder = encoder
        return model


class LamaModel(LamaPreTrainedModel):
    r"""An encoder and a [`LamaPooler`] over its last hidden states.

    Args:
        config ([`LamaConfig`]): encoder and pooler.

    Shapes:
        inputs as of the encoder; `last_hidden_state` `(batch, t, d)`, `pooler_output` `(batch, heads * d)`,
        `hidden_states` of the encoder, with `output_hidden_states=True`; `attentions` one tensor `(batch, heads, t)`:
        the pooler's, whether or not `output_attentions` asks for them. The GRU reads `input_ids`, `attention_mask` and
        `inputs_embeds`; it takes no notice of `token_type_ids`, which tokenizers give to every model.

    Raises:
        ConfigError: a sequence that is all padding, or an argument that the GRU does not know.
    """

    def __init__(self, config):
        super().__init__(config)
        if config.encoder is None:
            self.encoder = RecurrentEncoder(config)
        else:
            self.encoder = AutoModel.from_config(config.encoder)
        self.pooler = LamaPooler(config.features, config.num_heads, config.context, config.l2_norm)
        self.post_init()

    def get_input_embeddings(self):
        recurrent = isinstance(self.encoder, RecurrentEncoder)
        return self.encoder.embeddings if recurrent else self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value):
        if isinstance(self.encoder, RecurrentEncoder):
            self.encoder.embeddings = value
        else:
            self.encoder.set_input_embeddings(value)

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, inputs_embeds=None, **kwargs):
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        # Those of the encoder would be thrown away.
        kwargs.pop("output_attentions", None)
        if isinstance(self.encoder, RecurrentEncoder):
            _refuse_unread(kwargs)
        else:
            given |= {"token_type_ids": token_type_ids, **kwargs, "return_dict": True}
        found = self.encoder(**{key: value for key, value in given.items() if value is not None})
        pooled, attention = self.pooler(found.last_hidden_state, attention_mask)
        return BaseModelOutputWithPooling(
            last_hidden_state=found.last_hidden_state,
            pooler_output=pooled,
            hidden_states=found.get("hidden_states"),
            attentions=(attention,),
        )


class LamaForSequenceClassification(LamaPreTrainedModel):
    r"""[`LamaModel`] with one linear layer on what is pooled, trained as any other classifier by `Trainer`.

    Args:
        config ([`LamaConfig`]): encoder, pooler and `num_labels`.

    Raises:
        ConfigError: as [`LamaModel`].
    """

    def __init__(self, config):
        super().__init__(config)
        self.lama = LamaModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.num_heads * config.features, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, token_type_ids=None, inputs_embeds=None, labels=None, **kwargs
    ):
        counted = {key: kwargs.pop(key) for key in ("num_items_in_batch",) if key in kwargs}
        kwargs["return_dict"] = True
        found = self.lama(input_ids, attention_mask, token_type_ids, inputs_embeds, **kwargs)
        logits = self.classifier(self.dropout(found.pooler_output))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **counted)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=found.hidden_states, attentions=found.attentions
        )


def _refuse_unread(given):
    """Refuse arguments that the GRU would not read; wrappers pass `None` for what they were not given themselves."""
    given = {name: value for name, value in given.items() if value is not None}
    if given.pop("output_hidden_states", False):
        raise ConfigError(
            "`output_hidden_states`=True asks for the states between the layers of the encoder, which a GRU does not "
            "give; leave it out, or give LamaConfig an `encoder`."
        )
    if given:
        raise ConfigError(
            f"LAMA over a GRU does not know {sorted(given)}; it reads `input_ids`, `attention_mask`, `inputs_embeds` "
            "and, as a classifier, `labels`. Leave out the others, or give LamaConfig an `encoder` that reads them."
        )
