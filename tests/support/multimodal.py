"""Tiny models of images and sound, with rows whose tensors do not all go by rows.

LLaVA's images lie in one tensor, some rows have none and some two; Qwen2-VL's are patches of
several sizes, end to end, and its positions ``[3, rows, seq]``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.functional import pad

IMAGE, PAD = 5, 0
_FILLS = {
    **dict.fromkeys(("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"), 0),
    "labels": -100,
}
_TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SIGHT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}

Rows = list[dict[str, Any]]
Kit = tuple[Callable[[], nn.Module], Rows, Callable[[Rows], dict[str, Any]]]


def _rows(prefixes: list[list[int]]) -> Rows:
    draw, rows = random.Random(1), []
    for prefix in prefixes:
        text = [draw.randrange(10, 60) for _ in range(draw.randint(3, 10))]
        ids = [1, *prefix, *text]
        masked = 1 + len(prefix) + draw.randint(0, len(text) - 2)
        labels = [-100] * masked + ids[masked:]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


def _pad_text(rows: Rows) -> dict[str, Any]:
    width = max(len(row["input_ids"]) for row in rows)
    return {
        key: torch.tensor([[*row[key], *[fill] * (width - len(row[key]))] for row in rows])
        for key, fill in _FILLS.items()
        if key in rows[0]
    }


def _noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def llava(images_per_row: tuple[int, ...]) -> Kit:
    def build() -> nn.Module:
        config = transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**_TEXT),
            vision_config=transformers.CLIPVisionConfig(**_SIGHT),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
        )
        return transformers.LlavaForConditionalGeneration(config)

    counts = [images_per_row[i % len(images_per_row)] for i in range(7)]
    rows = _rows([[IMAGE] * 4 * n for n in counts])
    for i, (row, n) in enumerate(zip(rows, counts, strict=True)):
        row["images"] = _noise(n, 3, 8, 8, seed=i)

    def collate(part: Rows) -> dict[str, Any]:
        images = torch.cat([row["images"] for row in part])
        return _pad_text(part) | ({"pixel_values": images} if len(images) else {})

    return build, rows, collate


def gemma3() -> Kit:
    def build() -> nn.Module:
        config = transformers.Gemma3Config(
            text_config=_TEXT | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
            vision_config=_SIGHT,
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
            boi_token_index=6,
            eoi_token_index=7,
        )
        return transformers.Gemma3ForConditionalGeneration(config)

    rows = _rows([[IMAGE] * 4] * 7)
    for i, row in enumerate(rows):
        row["token_type_ids"] = [int(token == IMAGE) for token in row["input_ids"]]
        row["image"] = _noise(3, 8, 8, seed=i)
    return (
        build,
        rows,
        lambda part: (
            _pad_text(part) | {"pixel_values": torch.stack([row["image"] for row in part])}
        ),
    )


def qwen2_vl(*, with_positions: bool) -> Kit:
    def build() -> nn.Module:
        rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
        config = transformers.Qwen2VLConfig(
            text_config=_TEXT | {"rope_parameters": rope},
            vision_config={
                "depth": 1,
                "embed_dim": 16,
                "hidden_size": 16,
                "num_heads": 2,
                "patch_size": 4,
                "mlp_ratio": 2,
            },
            image_token_id=IMAGE,
            video_token_id=6,
            vision_start_token_id=7,
            vision_end_token_id=8,
        )
        return transformers.Qwen2VLForConditionalGeneration(config)

    sizes = [((4, 4), (4, 2), (2, 2))[i % 3] for i in range(7)]
    rows = _rows([[7, *[IMAGE] * (height * width // 4), 8] for height, width in sizes])
    for i, (row, size) in enumerate(zip(rows, sizes, strict=True)):
        row["mm_token_type_ids"] = [int(token == IMAGE) for token in row["input_ids"]]
        row["patches"] = _noise(size[0] * size[1], 3 * 2 * 16, seed=i)
        row["grid"] = torch.tensor([[1, *size]])

    def collate(part: Rows) -> dict[str, Any]:
        batch = _pad_text(part)
        batch["pixel_values"] = torch.cat([row["patches"] for row in part])
        batch["image_grid_thw"] = torch.cat([row["grid"] for row in part])
        if with_positions:
            places = torch.arange(batch["input_ids"].shape[1]).expand(3, len(part), -1).clone()
            for i, row in enumerate(part):  # each row its own, and each of the three axes
                places[1, i] += len(row["input_ids"]) % 3
                places[2, i] += len(row["input_ids"]) % 2
            batch["position_ids"] = places
        return batch

    return build, rows, collate


def whisper() -> Kit:
    def build() -> nn.Module:
        config = transformers.WhisperConfig(
            vocab_size=64,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=40,
            dropout=0.0,
            pad_token_id=PAD,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
        return transformers.WhisperForConditionalGeneration(config)

    draw = random.Random(2)
    rows = [
        {
            "input_features": _noise(8, 20, seed=i),
            "labels": [draw.randrange(5, 60) for _ in range(draw.randint(1, 9))],
        }
        for i in range(7)
    ]
    return (
        build,
        rows,
        lambda part: {
            "input_features": torch.stack([row["input_features"] for row in part]),
            "labels": _pad_labels(part),
        },
    )


def wav2vec2_ctc() -> Kit:
    """Connectionist temporal classification: a mean over rows of means over their labels."""

    def build() -> nn.Module:
        config = transformers.Wav2Vec2Config(
            vocab_size=12,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            conv_dim=[8, 8],
            conv_stride=[2, 2],
            conv_kernel=[3, 3],
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            feat_proj_dropout=0.0,
            final_dropout=0.0,
            layerdrop=0.0,
            apply_spec_augment=False,
            ctc_loss_reduction="mean",
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
        )
        return transformers.Wav2Vec2ForCTC(config)

    draw = random.Random(3)
    rows = [
        {
            "input_values": _noise(draw.randint(60, 90), seed=i),
            "labels": [draw.randrange(1, 12) for _ in range(draw.randint(1, 5))],
        }
        for i in range(7)
    ]

    def collate(part: Rows) -> dict[str, Any]:
        width = max(len(row["input_values"]) for row in part)
        sounds = [row["input_values"] for row in part]
        return {
            "input_values": torch.stack([pad(x, (0, width - len(x))) for x in sounds]),
            "attention_mask": torch.stack([(torch.arange(width) < len(x)).long() for x in sounds]),
            "labels": _pad_labels(part),
        }

    return build, rows, collate


def image_classifier(name: str) -> Kit:
    def build() -> nn.Module:
        if name == "vit":
            no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            config = transformers.ViTConfig(**_SIGHT, num_labels=3, **no_dropout)
            return transformers.ViTForImageClassification(config)
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3
        )
        return transformers.ResNetForImageClassification(config)

    rows = [{"pixel_values": _noise(3, 8, 8, seed=i), "labels": i % 3} for i in range(7)]
    return build, rows, transformers.default_data_collator


def _pad_labels(rows: Rows) -> torch.Tensor:
    width = max(len(row["labels"]) for row in rows)
    return torch.tensor([[*row["labels"], *[-100] * (width - len(row["labels"]))] for row in rows])
