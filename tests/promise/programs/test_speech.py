"""Programs that train on sound: CTC, classes, transcripts."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from support.programs import NUM_ROWS, Program, cases, hold
from torch.nn import functional as F

SMALL = {
    "vocab_size": 12,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8),
    "conv_kernel": (8, 4),
    "conv_stride": (8, 4),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "classifier_proj_size": 8,
    "num_labels": 3,
    "mask_time_prob": 0.0,
    "pad_token_id": 0,
} | dict.fromkeys(
    (
        "hidden_dropout",
        "attention_dropout",
        "activation_dropout",
        "feat_proj_dropout",
        "final_dropout",
        "layerdrop",
    ),
    0.0,
)


def wav2vec2(head, **changes):
    return lambda: head(T.Wav2Vec2Config(**SMALL | changes))


def sounds(label):
    def make():
        rows = []
        for i in range(NUM_ROWS):
            draw = torch.Generator().manual_seed(i)
            sound = torch.randn(400 + 90 * (i % 7), generator=draw, dtype=torch.float64)
            rows.append({"input_values": sound, "labels": label(i)})
        return rows

    return make


def transcript(i):
    return [1 + (i + 2 * place) % 11 for place in range(1 + i % 5)]


def collate(rows):
    """As people's own data collator with padding: sounds by zeros, labels by -100."""
    width = max(len(row["input_values"]) for row in rows)
    lengths = torch.tensor([len(row["input_values"]) for row in rows])
    sounds = [F.pad(row["input_values"], (0, width - len(row["input_values"]))) for row in rows]
    batch = {
        "input_values": torch.stack(sounds),
        "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
    }
    if isinstance(rows[0]["labels"], int):
        return batch | {"labels": torch.tensor([row["labels"] for row in rows])}
    longest = max(len(row["labels"]) for row in rows)
    labels = [row["labels"] + [-100] * (longest - len(row["labels"])) for row in rows]
    return batch | {"labels": torch.tensor(labels)}


def whisper():
    return T.WhisperForConditionalGeneration(
        T.WhisperConfig(
            vocab_size=32,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            num_mel_bins=4,
            max_source_positions=10,
            max_target_positions=16,
            decoder_start_token_id=1,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            dropout=0.0,
        )
    )


def spectra():
    return [
        {
            "input_features": torch.randn(
                4, 20, generator=torch.Generator().manual_seed(i), dtype=torch.float64
            ),
            "labels": transcript(i),
        }
        for i in range(NUM_ROWS)
    ]


def collate_spectra(rows):
    longest = max(len(row["labels"]) for row in rows)
    labels = [row["labels"] + [-100] * (longest - len(row["labels"])) for row in rows]
    return {
        "input_features": torch.stack([row["input_features"] for row in rows]),
        "labels": torch.tensor(labels),
    }


def frozen_features():
    model = wav2vec2(T.Wav2Vec2ForCTC, ctc_loss_reduction="mean")()
    model.freeze_feature_encoder()
    return model


SLOW = {"learning_rate": 0.002}

PROGRAMS = {
    "CTC, a sum": Program(
        wav2vec2(T.Wav2Vec2ForCTC),
        sounds(transcript),
        collate,
        options=SLOW,
        stock="exact",
        says="a sum over its targets",
    ),
    "CTC, a mean": Program(
        wav2vec2(T.Wav2Vec2ForCTC, ctc_loss_reduction="mean"), sounds(transcript), collate
    ),
    "CTC, frozen features": Program(frozen_features, sounds(transcript), collate),
    "sound classes": Program(
        wav2vec2(T.Wav2Vec2ForSequenceClassification), sounds(lambda i: i % 3), collate
    ),
    "transcripts": Program(
        whisper,
        spectra,
        collate_spectra,
        T.Seq2SeqTrainer,
        arguments=T.Seq2SeqTrainingArguments,
    ),
}


@pytest.mark.parametrize("program", cases(PROGRAMS))
def test_a_program_on_sound_trains(program, tmp_path):
    hold(program, tmp_path)
