"""Tiny configurations for the text architectures of Transformers, without the hub.

``tiny_config("mixtral")`` starts from the class's own defaults and shrinks every field whose name
says what it is: widths, depths, heads, experts, vocabulary. Dropout of any name becomes 0, so that
train mode computes what eval mode computes. What a name cannot say stands in ``OVERRIDES``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB_SIZE = 99
MAX_LENGTH = 64

# Field name -> value in the tiny model. 32 wide, 4 heads of 8, two layers.
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "n_embed"), 32
    ),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim", "input_embedding_size"), 32),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "num_decoder_layers",
            "num_encoder_layers",
            "encoder_layers",
            "decoder_layers",
            "num_blocks",
        ),
        2,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "encoder_attention_heads",
            "decoder_attention_heads",
            "num_encoder_attention_heads",
            "num_decoder_attention_heads",
        ),
        4,
    ),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "attention_head_size"), 8),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "d_ff",
            "n_inner",
            "d_inner",
            "ffn_hidden_size",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "dim_ff",
            "dff",
            "hidden_dim",
        ),
        48,
    ),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24
    ),
    **dict.fromkeys(
        (
            "num_local_experts",
            "num_experts",
            "n_routed_experts",
            "moe_num_experts",
            "n_experts",
            "num_routed_experts",
        ),
        4,
    ),
    **dict.fromkeys(
        (
            "num_experts_per_tok",
            "num_experts_per_token",
            "moe_top_k",
            "moe_k",
            "top_k_experts",
        ),
        2,
    ),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length"), MAX_LENGTH
    ),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB_SIZE),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    # Fewer than a row has tokens, so that sparse attention chooses among them.
    **dict.fromkeys(("index_topk", "keep_window_size"), 4),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    "gradient_checkpointing": False,
    "use_cache": False,
}


# Compositions with pictures or sound whose text class takes the text part's configuration.
TEXT_PART = {
    name: f"{name}_text" for name in ("dots3_note", "llama4", "qwen3_5", "qwen3_5_moe", "qwen4_exp")
}


def tiny_config(model_type: str, *, router_loss: bool = False, **overrides: Any) -> Any:
    """Build the smallest working configuration of ``model_type``.

    Args:
        model_type: Key of Transformers' ``CONFIG_MAPPING``, such as ``"llama"``.
        router_loss: Switch the auxiliary loss of a mixture of experts on, where there is one.
        **overrides: Fields that win over every heuristic, such as ``num_labels=3``.
    """
    model_type = TEXT_PART.get(model_type, model_type)
    return _shrink(CONFIG_MAPPING[model_type], model_type, overrides, router_loss=router_loss)


def has_router_loss(model_type: str) -> bool:
    """Whether the architecture has a router loss that its configuration switches on."""
    config_class = CONFIG_MAPPING[TEXT_PART.get(model_type, model_type)]
    classes = [config_class, *(getattr(config_class, "sub_configs", None) or {}).values()]
    return any("output_router_logits" in _defaults(c) for c in classes if c is not AutoConfig)


def _shrink(
    config_class: type[Any], model_type: str, overrides: dict[str, Any], *, router_loss: bool
) -> Any:
    """Shrink every field of ``config_class`` that has a known name, sub-configurations first."""
    own = dict(OVERRIDES.get(model_type, {}))
    defaults = _defaults(config_class)
    fields: dict[str, Any] = {}
    for name, sub_class in (getattr(config_class, "sub_configs", None) or {}).items():
        if sub_class is not AutoConfig and name not in own:
            fields[name] = _shrink(sub_class, sub_class.model_type, {}, router_loss=router_loss)
    for name, value in defaults.items():
        small = _small_value(name, value)
        if small is not None and name not in fields:
            fields[name] = small
    if router_loss and "output_router_logits" in defaults:
        fields["output_router_logits"] = True
    fields.update(own)
    fields.update({k: v for k, v in overrides.items() if k != "is_decoder" or k in defaults})
    return config_class(**fields)


def _small_value(name: str, value: Any) -> Any:
    """The tiny model's value of a field with this name and default, None to leave it alone."""
    if name in SIZES and not isinstance(value, (str, list, tuple, dict)):
        optional = name not in ("intermediate_size", "vocab_size", "hidden_size")
        return None if value is None and optional else SIZES[name]
    if (
        ("drop" in name or "jitter" in name)
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
    ):
        return 0.0
    if name in ("num_key_value_heads", "num_kv_heads", "multi_query_group_num"):
        return None if value is None else 2
    if name == "pad_token_id":
        return value if isinstance(value, int) and 0 <= value < 5 else 0
    if name.endswith("_token_id") and isinstance(value, (list, tuple)):
        return 2
    if (
        name.endswith(("_token_id", "_token_index"))
        and isinstance(value, int)
        and value >= VOCAB_SIZE
    ):
        return {"bos_token_id": 1, "eos_token_id": 2}.get(name, 3)
    return None


def _defaults(config_class: type[Any]) -> dict[str, Any]:
    """The declared fields of a configuration class and their default values."""
    names: dict[str, Any] = {}
    if dataclasses.is_dataclass(config_class):
        for field in dataclasses.fields(config_class):
            if field.default is not dataclasses.MISSING:
                names[field.name] = field.default
            elif field.default_factory is not dataclasses.MISSING:
                names[field.name] = field.default_factory()
    return names


# What no field name can tell.
_MLA = {"num_key_value_heads": 4}  # latent attention has one key head per query head
_MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8}

OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "deepseek_v3",
            "deepseek_v32",
            "dots3_note",
            "dots3_note_text",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "minicpm3",
            "mistral4",
            "youtu",
        ),
        _MLA,
    ),
    "deepseek_v2": {**_MLA, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "bamba": _MAMBA_HEADS,
    "granitemoehybrid": _MAMBA_HEADS,
    "mamba2": {"head_dim": 8, "num_heads": 8},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32},
    "flint": {"mlp_only_layers": []},
    "deepseek_v4": {"mlp_layer_types": ["moe", "moe"]},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            name: {"rope_type": "default", "rope_theta": 10000.0}
            for name in ("full_attention", "sliding_attention")
        },
    },
    "dbrx": {
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 10000.0},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 48},
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mpt": {"attn_config": {}},
    "nemotron": {"num_key_value_heads": 2},
    "neomme": {"head_dim": 16, "num_attention_heads": 2},
    "perceiver": {
        "num_latents": 8,
        "d_latents": 32,
        "d_model": 32,
        "num_self_attends_per_block": 1,
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 2,
    },
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ("local", "local"),
        "feed_forward_size": 48,
    },
    "xmod": {"languages": ("en_XX",), "default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "adapter_rank": 4},
    "zaya": {"num_experts_per_tok": 1},
    "switch_transformers": {
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "decoder_start_token_id": 0,
    },
    **{name: {"decoder_start_token_id": 0} for name in ("t5", "mt5", "umt5", "longt5")},
    "lilt": {"hidden_size": 48},
    "luke": {"entity_vocab_size": 9, "entity_emb_size": 32},
    # An expert that is full drops tokens, by what else is in the batch: here none is ever full.
    "nllb-moe": {"encoder_sparse_step": 1, "decoder_sparse_step": 1, "expert_capacity": 512},
    "roc_bert": {"pronunciation_vocab_size": VOCAB_SIZE, "shape_vocab_size": VOCAB_SIZE},
    "markuplm": {"xpath_unit_hidden_size": 4, "max_depth": 4},
    "fsmt": {"langs": ("en", "de"), "src_vocab_size": VOCAB_SIZE, "tgt_vocab_size": VOCAB_SIZE},
    "longformer": {"attention_window": [4, 4]},
    "led": {"attention_window": [4, 4]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
}
