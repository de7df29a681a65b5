"""Tiny random models of many architectures, and inputs for them: seconds on a CPU, real modelling code."""

import torch
import transformers


def _text(vocab):
    return lambda: {"input_ids": torch.randint(3, vocab, (2, 7), generator=torch.Generator().manual_seed(3))}


def _llama(**kwargs):
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return sizes | kwargs


def _causal(config):
    return transformers.AutoModelForCausalLM.from_config(config)


def _whisper():
    config = transformers.WhisperConfig(
        vocab_size=96, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, num_mel_bins=8, max_source_positions=16,
        max_target_positions=16, decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def _llava():
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 16, "patch_size": 8, "projection_dim": 64,
    }  # fmt: skip
    text = {"model_type": "llama", **_llama()}
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=90)
    return transformers.LlavaForConditionalGeneration(config)


def _llava_inputs():
    ids = torch.randint(3, 80, (2, 11), generator=torch.Generator().manual_seed(3))
    ids[:, 2:6] = 90
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


def _t5_inputs():
    return {**_text(96)(), "decoder_input_ids": _text(96)()["input_ids"][:, :5]}


def _whisper_inputs():
    features = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(4))
    return {"input_features": features, "decoder_input_ids": _text(96)()["input_ids"]}


def _vit_inputs():
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))}


def _deepseek():
    config = transformers.DeepseekV3Config(
        **_llama(num_key_value_heads=4), moe_intermediate_size=48, n_routed_experts=8, num_experts_per_tok=2,
        n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=8,
        v_head_dim=16, qk_nope_head_dim=16, n_shared_experts=1,
    )  # fmt: skip
    return _causal(config)


def _gpt_oss():
    config = transformers.GptOssConfig(
        **_llama(), head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return _causal(config)


# name -> (make the model, make its inputs)
ARCHITECTURES = {
    "llama": (lambda: _causal(transformers.LlamaConfig(**_llama())), _text(96)),
    "llama_tied": (lambda: _causal(transformers.LlamaConfig(**_llama(tie_word_embeddings=True))), _text(96)),
    "qwen2": (lambda: _causal(transformers.Qwen2Config(**_llama())), _text(96)),
    "gpt2": (
        lambda: _causal(transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64)),
        _text(96),
    ),
    "bert": (
        lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(
                vocab_size=96,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=64,
            )
        ),
        _text(96),
    ),
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=96, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0
            )
        ),
        _t5_inputs,
    ),
    "phi3": (lambda: _causal(transformers.Phi3Config(**_llama())), _text(96)),
    "gpt_neox": (
        lambda: _causal(
            transformers.GPTNeoXConfig(
                vocab_size=96,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=64,
            )
        ),
        _text(96),
    ),
    "vit": (
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=16,
                patch_size=8,
                num_labels=3,
            )
        ),
        _vit_inputs,
    ),
    "whisper": (_whisper, _whisper_inputs),
    "llava": (_llava, _llava_inputs),
    "mixtral": (
        lambda: _causal(transformers.MixtralConfig(**_llama(), num_local_experts=4, num_experts_per_tok=2)),
        _text(96),
    ),
    "qwen3_moe": (
        lambda: _causal(
            transformers.Qwen3MoeConfig(
                **_llama(), head_dim=16, moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2
            )
        ),
        _text(96),
    ),
    "gpt_oss": (_gpt_oss, _text(96)),
    "deepseek_v3": (_deepseek, _text(96)),
}


def tiny_model(architecture, seed=0):
    """A random model of `architecture`, a key of `ARCHITECTURES`, and a function that makes inputs for it."""
    make, inputs = ARCHITECTURES[architecture]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval(), inputs
