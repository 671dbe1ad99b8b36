"""Programs that train on images: classes, masks, boxes, noise, reconstructions, two towers."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from support.programs import NUM_ROWS, Program, cases, hold
from torch import nn
from torch.nn import functional as F

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
IMAGES = {"image_size": 16, "patch_size": 8, "num_channels": 3}


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(**columns):
    """Rows of one image and of `columns`, functions of the row's number."""

    def make():
        return [
            {"pixel_values": draw(3, 16, 16, seed=i)}
            | {name: value(i) for name, value in columns.items()}
            for i in range(NUM_ROWS)
        ]

    return make


def stacked(rows):
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}


def vit():
    return T.ViTForImageClassification(T.ViTConfig(**SMALL | IMAGES, num_labels=3))


def staged(head, **changes):
    """Four stages fed by depthwise convolutions; `changes` are of its config."""
    config = T.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout_prob=0.0,
        drop_path_rate=0.0,
        decoder_hidden_size=8,
        num_labels=3,
        semantic_loss_ignore_index=255,
        **changes,
    )
    return head(config)


def quiet_norms(model):
    """As fine-tuners do with few images a batch: BatchNorm by its running statistics."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().train = lambda mode=True, norm=module: norm
    return model


def mask_of(i):
    """A mask of classes; the share of pixels that count differs from row to row."""
    mask = draw(16, 16, seed=100 + i).abs().mul(2).long().clamp(max=2)
    mask[: i % 13] = 255
    return mask


class Detector(nn.Module):
    """Boxes and classes of a fixed set of queries; the loss of each image is its own mean."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 8, stride=8)
        self.boxes, self.classes = nn.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, pixel_values, labels=None):
        queries = self.backbone(pixel_values).flatten(2).transpose(1, 2).tanh()
        boxes, classes = self.boxes(queries).sigmoid(), self.classes(queries)
        losses = []
        for i, wanted in enumerate(labels):
            n = len(wanted["boxes"])
            losses.append(
                F.l1_loss(boxes[i, :n], wanted["boxes"])
                + F.cross_entropy(classes[i, :n], wanted["class_labels"])
            )
        return {"loss": torch.stack(losses).mean(), "logits": classes, "pred_boxes": boxes}


class AllBoxes(Detector):
    """As DETR's: the sum over all boxes of the batch, divided by their number."""

    def forward(self, pixel_values, labels=None):
        outputs = super().forward(pixel_values, labels)
        n = torch.tensor([len(wanted["boxes"]) for wanted in labels])
        losses = [
            F.l1_loss(outputs["pred_boxes"][i, : n[i]], wanted["boxes"], reduction="sum")
            for i, wanted in enumerate(labels)
        ]
        return outputs | {"loss": torch.stack(losses).sum() / n.sum()}


def yolos():
    return T.YolosForObjectDetection(
        T.YolosConfig(
            **SMALL | IMAGES | {"image_size": [16, 16]}, num_labels=3, num_detection_tokens=4
        )
    )


def boxes_of(i):
    n = 1 + i % 3
    return {
        "boxes": draw(n, 4, seed=200 + i).sigmoid() / 2 + 0.2,
        "class_labels": torch.arange(n) % 3,
    }


def detections(rows):
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": [row["labels"] for row in rows],
    }


class TimmLike(nn.Module):
    """Gives logits alone, takes an image by position: no labels, no loss, no config."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 8, stride=8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.stem(x).relu().mean((2, 3)))


class Classifies(T.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        logits = model(inputs["pixel_values"])
        loss = F.cross_entropy(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss


class Mixes(T.Trainer):
    """Mixup inside of the micro-batch: each image with the one before it."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        images, labels = inputs["pixel_values"], inputs["labels"]
        logits = model((images + images.roll(1, 0)) / 2)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits, labels.roll(1))) / 2
        return (loss, {"logits": logits}) if return_outputs else loss


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.time = nn.Embedding(10, 8)
        self.into, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, noisy, steps):
        return self.out((self.into(noisy) + self.time(steps)[:, :, None, None]).tanh())


class PredictsNoise(T.Trainer):
    """DDPM: noise and time step are drawn for each image, the noise is predicted."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        images = inputs["pixel_values"]
        noise, steps = torch.randn_like(images), torch.randint(0, 10, (len(images),))
        kept = (1 - (steps + 1) / 11)[:, None, None, None]
        loss = F.mse_loss(model(kept.sqrt() * images + (1 - kept).sqrt() * noise, steps), noise)
        return (loss, {"noise": noise}) if return_outputs else loss


class Autoencoder(nn.Module):
    """A VAE: the code is drawn, the loss sums over pixels and takes the mean over rows."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(768, 8), nn.Linear(4, 768)

    def forward(self, pixel_values):
        flat = pixel_values.flatten(1) / 10
        mean, log_variance = self.encode(flat).chunk(2, -1)
        code = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        divergence = (mean**2 + log_variance.exp() - 1 - log_variance).sum(-1) / 2
        loss = ((self.decode(code) - flat).square().sum(-1) + divergence).mean()
        return {"loss": loss, "code": code}


def masked_autoencoder():
    return T.ViTMAEForPreTraining(
        T.ViTMAEConfig(
            **SMALL | IMAGES | {"image_size": 32},
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=24,
        )
    )


def larger_images():
    return [{"pixel_values": draw(3, 32, 32, seed=i)} for i in range(NUM_ROWS)]


def clip():
    text = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 8,
        "eos_token_id": 31,
    }
    vision = {k: v for k, v in SMALL.items() if "dropout" not in k} | IMAGES
    return T.CLIPModel(T.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def captions(i):
    return torch.tensor([1 + (i * place) % 29 for place in range(5)] + [31])


class TwoTowers(T.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs, return_loss=True)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class WithAdversary(T.Trainer):
    """Two losses of one forward: what is wanted, and a penalty on the gradient of the input."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        images = inputs["pixel_values"].requires_grad_()
        logits = model(images)
        loss = F.cross_entropy(logits, inputs["labels"])
        if torch.is_grad_enabled():
            (slope,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
            loss = loss + 0.1 * slope.flatten(1).norm(dim=1).mean()
        return (loss, {"logits": logits}) if return_outputs else loss


classes = images(labels=lambda i: [0, 0, 1, 2, 0][i % 5])

PROGRAMS = {
    "image classes": Program(vit, classes, stacked, stock="exact"),
    "image classes in stages": Program(
        lambda: staged(T.SegformerForImageClassification), classes, stacked, stock="exact"
    ),
    "timm-like": Program(TimmLike, classes, stacked, Classifies),
    "mixup": Program(TimmLike, classes, stacked, Mixes, ours="named", says="influence each other"),
    "segmentation": Program(
        lambda: quiet_norms(staged(T.SegformerForSemanticSegmentation)),
        images(labels=mask_of),
        stacked,
        says="taken once over all rows",
    ),
    "detection": Program(Detector, images(labels=boxes_of), detections),
    "detection, mean over boxes": Program(
        AllBoxes,
        images(labels=boxes_of),
        detections,
        says="taken once over all rows",
    ),
    "detection, YOLOS": Program(
        yolos,
        images(labels=boxes_of),
        detections,
        says="taken once over all rows",
    ),
    "noise prediction": Program(Denoiser, images(), stacked, PredictsNoise, ours="drawn"),
    "VAE": Program(Autoencoder, images(), stacked, ours="drawn"),
    "masked autoencoder": Program(masked_autoencoder, larger_images, stacked, ours="drawn"),
    "two towers": Program(
        clip,
        images(input_ids=captions),
        stacked,
        TwoTowers,
        says="taken once over all rows",
    ),
    "gradient penalty": Program(TimmLike, classes, stacked, WithAdversary),
}


@pytest.mark.parametrize("program", cases(PROGRAMS))
def test_a_program_on_images_trains(program, tmp_path):
    hold(program, tmp_path)
