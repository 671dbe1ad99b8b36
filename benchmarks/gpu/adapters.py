"""What other packages bring, where they are installed: adapters, Liger's kernels, a recipe."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from support import reference
from transformers import AutoModelForCausalLM

from benchmarks.gpu.checks import Setting
from benchmarks.gpu.modes import IN_FLOAT32, off, on_host, small_llama, train, whole

ROOT = Path(__file__).resolve().parents[2]


def _adapted(model: Any, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config, **options)


def lora(setting: Setting) -> dict[str, Any]:
    """Adapters alone are trained, and their gradient is that of the whole batch."""
    trainer, recorder = train(setting, model=_adapted(small_llama()))
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained
    assert set(recorder.gradients[0]) == set(trained)
    error = off(recorder.gradients[0], whole(setting, _adapted(small_llama())), limit=IN_FLOAT32)
    return {"off": error}


def qlora(setting: Setting) -> dict[str, Any]:
    """Adapters on weights of 4 bits, which lie in parameters that cannot be trained."""
    setting.needs_cuda("4-bit weights")
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    with tempfile.TemporaryDirectory() as out:
        small_llama().save_pretrained(out)

        def build() -> Any:
            model = AutoModelForCausalLM.from_pretrained(
                out, quantization_config=four_bits, device_map={"": 0}, dtype=torch.bfloat16
            )
            ready = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
            return _adapted(ready)

        _, recorder = train(setting, model=build(), bf16=True)
        with torch.autocast("cuda", torch.bfloat16):
            expected = whole(setting, build())
    # Both are in bfloat16: what is seen here is a wrong weight, not rounding.
    error = off(recorder.gradients[0], expected, limit=5e-2)
    scale = reference.scale(on_host(recorder.gradients[0]), expected)
    assert abs(scale - 1) <= 2e-2, scale
    return {"off": error, "scale": scale}


def liger(setting: Setting) -> dict[str, Any]:
    """Liger's kernels: the shortcuts it bypasses are off, and the gradient is the same."""
    setting.needs_cuda("Liger's kernels are for accelerators")
    trainer, recorder = train(setting, use_liger_kernel=True)
    shortcuts = trainer.shortcuts
    assert not shortcuts.target_only_logits, shortcuts
    assert not shortcuts.chunked_loss, shortcuts
    assert "Liger" in shortcuts.reason("target_only_logits"), shortcuts.refused
    return {"off": off(recorder.gradients[0], whole(setting), limit=1e-3)}


def quickstart(setting: Setting) -> dict[str, Any]:
    """The quickstart recipe trains on the device, from its command line."""
    steps = 4 if setting.is_rehearsal else 200
    overrides = [
        f"train.use_cpu={str(setting.is_rehearsal).lower()}",
        f"train.max_steps={steps}",
        f"train.eval_steps={steps}",
        f"train.warmup_steps={steps // 10}",
    ]
    if setting.is_rehearsal:
        overrides += ["tokenizer.train.vocab_size=300"]
        overrides += ["model.config.num_hidden_layers=1", "model.config.hidden_size=32"]
        overrides += ["model.config.intermediate_size=32", "train.effective_batch_size=4"]
        overrides += ["data.holdout=4"]
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run(
            [
                *(sys.executable, str(ROOT / "recipes/sft.py"), "recipes/quickstart.yaml"),
                *(*overrides, f"output.dir={out}"),
            ],
            cwd=ROOT,
            env={**os.environ, "WANDB_MODE": "disabled", "WANDB_DIR": out},
            capture_output=True,
            text=True,
        )
    print(done.stdout[-4000:], done.stderr[-4000:])
    assert done.returncode == 0, done.stderr[-1500:]
    loss = re.search(r"held-out loss ([\d.]+)", done.stdout)
    assert loss is not None, done.stdout[-1500:]
    limit = 6.5 if setting.is_rehearsal else 2.5
    assert float(loss[1]) < limit, loss[0]
    return {"updates": steps, "held-out loss": float(loss[1])}
