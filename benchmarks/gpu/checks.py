"""What a check is, and all of them in the order of their importance."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Check", "Setting", "SkippedCheckError", "all_checks"]

CORRECTNESS, SPEED = 1, 2
"""Phases: the groups of the first run side by side, those of the second one after another."""


@dataclass(frozen=True)
class Check:
    """One claim that holds or not on this device.

    Attributes:
        name: Its name, ``area/what``.
        run: ``module:function`` of this package; called with a `Setting` and `options`.
        group: Checks of one group share a process.
        seconds: After so many it is killed, and failed.
        phase: `CORRECTNESS` or `SPEED`.
        packages: Modules it needs beside torch, transformers and accelerate.
        options: Keyword arguments of the function.
    """

    name: str
    run: str
    group: str
    seconds: float
    phase: int = CORRECTNESS
    packages: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def missing(self) -> str:
        """What it needs and is not installed; empty if everything is."""
        names = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(names)}" if names else ""


@dataclass(frozen=True)
class Setting:
    """Where a check runs.

    Attributes:
        device: "cuda" or "cpu".
        results: A folder for what a check leaves behind.
    """

    device: str
    results: Path

    @property
    def is_rehearsal(self) -> bool:
        """Whether only the code is tried, on tiny sizes."""
        return self.device == "cpu"

    def needs_cuda(self, why: str) -> None:
        """Skip the rest of a check in a rehearsal.

        Raises:
            SkippedCheckError: If there is no CUDA device.
        """
        if self.is_rehearsal:
            raise SkippedCheckError(f"needs a CUDA device: {why}")


class SkippedCheckError(Exception):
    """A check does not apply here; says why."""


ARCHITECTURES = (
    *("llama-causal", "qwen3-causal", "gemma3_text-causal", "mistral-causal", "phi3-causal"),
    *("gpt2-causal", "gpt_neox-causal", "smollm3-causal", "olmo2-causal", "granite-causal"),
    *("qwen3_moe-causal-router", "mixtral-causal-router", "gpt_oss-causal-router"),
    *("t5-seq2seq", "bart-seq2seq", "bert-mlm", "modernbert-mlm", "roberta-single"),
    *("deberta-v2-qa", "mamba-causal", "recurrent_gemma-causal", "starcoder2-causal"),
    *("cohere-causal", "stablelm-causal"),
)
"""As `tests/support/zoo.py` names them: architecture, head, and whether the router loss is on."""

PRECISIONS = ("float64", "float32", "bfloat16", "autocast")
REHEARSED = ("llama-causal", "mixtral-causal-router", "t5-seq2seq")
_GROUPS = 4


def all_checks(device: str) -> list[Check]:
    """List the checks for a device, the most important first."""
    checks = [
        Check("machine", "machine:describe", "machine", 60),
        *_exactness(ARCHITECTURES if device == "cuda" else REHEARSED),
        *_memory(),
        *_waits(),
        *_modes(),
        *_ranks(),
        *_speed(device),
    ]
    if device == "cpu":  # a process takes seconds to begin, and nothing is poisoned here
        checks = [_in_one_process(check) for check in checks]
    return checks


def _in_one_process(check: Check) -> Check:
    return Check(**{**vars(check), "group": "rehearsal", "phase": CORRECTNESS})


def _exactness(cases: tuple[str, ...]) -> list[Check]:
    found = [
        Check(
            f"exactness/{case}/{precision}",
            "exactness:compare",
            f"exactness-{i % _GROUPS}",
            120,
            options={"case": case, "precision": precision},
        )
        for i, case in enumerate(cases)
        for precision in PRECISIONS
    ]
    for attention, packages in {"sdpa": (), "flex_attention": ("triton",)}.items():
        found += [
            Check(
                f"exactness/trees-{attention}/{model_type}",
                "exactness:compare_trees",
                f"exactness-trees-{attention}",
                150,
                packages=packages,
                options={"model_type": model_type, "attention": attention},
            )
            for model_type in ("llama", "qwen3")
        ]
    attentions = {
        "flash_attention_2": ("flash_attn",),
        "flash_attention_3": ("flash_attn_interface",),
        "flex_attention": ("triton",),
    }
    for attention, packages in attentions.items():
        for model_type in ("llama", "qwen3"):
            found.append(
                Check(
                    f"exactness/packed-{attention}/{model_type}",
                    "exactness:compare_packed",
                    f"exactness-{attention}",
                    150,
                    packages=packages,
                    options={"model_type": model_type, "attention": attention},
                )
            )
    return found


def _memory() -> list[Check]:
    found = [
        Check(
            f"out-of-memory/{where}",
            "memory:recover",
            "memory",
            60,
            options={"where": where},
        )
        for where in ("forward", "backward")
    ]
    for name in ("pressure", "optimizer", "evaluation", "row_alone"):
        shown = name.replace("_", "-")
        found.append(Check(f"out-of-memory/{shown}", f"memory:{name}", "memory", 90))
    return found


def _waits() -> list[Check]:
    return [
        Check(
            f"waits/{kind}",
            "waits:count",
            "waits",
            90,
            packages=("flash_attn",) if "flash" in kind else (),
            options={"kind": kind},
        )
        for kind in ("padded", "auto", "bf16", "packed", "packed-flash", "workers")
    ]


def _modes() -> list[Check]:
    plain = ("log_row", "tuned_budget", "workers", "dropout", "checkpointing", "resume", "fp16")
    found = [
        Check(f"modes/{name.replace('_', '-')}", f"modes:{name}", "modes", 90)
        for name in (*plain, "tf32", "verify", "non_finite", "noise_scale")
    ]
    return [
        *found,
        Check("modes/lora", "adapters:lora", "adapters", 90, packages=("peft",)),
        Check("modes/qlora", "adapters:qlora", "adapters", 120, packages=("peft", "bitsandbytes")),
        Check("modes/liger", "adapters:liger", "adapters", 120, packages=("liger_kernel",)),
        Check("modes/compile", "modes:compiled", "compile", 200),
        Check(
            "modes/quickstart",
            "adapters:quickstart",
            "quickstart",
            150,
            packages=("datasets", "pydantic", "yaml", "wandb", "rich", "typer"),
        ),
    ]


def _ranks() -> list[Check]:
    return [
        Check(f"ranks/{kind}", "ranks:launch", "ranks", 120, options={"kind": kind})
        for kind in ("torchrun", "two-on-one-device")
    ]


GSM8K, HEAVY_TAIL = "gsm8k-lengths", "heavy-tail"


def _speed(device: str) -> list[Check]:
    first = (
        *("ours-packed", "stock-rebalance-16", "stock-random", "ours-auto", "ours-padded"),
        *("dense-bound", "trl-padding-free", "trl-packing", "stock-rebalance-8"),
        *("stock-rebalance-32", "stock-rebalance-64", "ours-padded-8192", "ours-packed-sdpa"),
        "ours-compiled",
    )
    if device == "cpu":
        pairs = [(variant, GSM8K) for variant in first[:8]]
    else:
        tail = first[:6]
        pairs = [*((v, GSM8K) for v in first), *((v, HEAVY_TAIL) for v in tail)]
    return [
        Check(
            f"speed/{rows}/{variant}",
            "speed_table:measure",
            "speed",
            150 if variant in ("ours-packed", "ours-auto", "ours-compiled") else 60,  # compiles
            phase=SPEED,
            packages=("trl", "datasets") if variant.startswith("trl") else (),
            options={"variant": variant, "rows": rows},
        )
        for variant, rows in pairs
    ]
