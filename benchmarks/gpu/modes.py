"""Ways to train that a device has of its own: each runs, and gives the gradient that it must."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from support import reference
from support.reference import Gradient
from support.tiny import Recorder, log_rows, make_trainer, pad, ragged_rows, tiny_llama

from benchmarks.gpu.checks import Setting, SkippedCheckError
from hf_gradacc import GradAccArguments, NonFiniteError, verify_parity
from hf_gradacc.tracking.mfu import peak_flops_of_this_device
from hf_gradacc.tracking.phases import PHASE_KEYS

NUM_ROWS = 12
ROWS = ragged_rows(NUM_ROWS, seed=3)
IN_FLOAT32 = 2e-5
"""How far two float32 gradients of the same rows may be apart; TF32 is off."""


def small_llama(**changes: Any) -> torch.nn.Module:
    """A Llama in float32 whose sizes kernels accept."""
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "attn_implementation": "sdpa",
        "use_cache": False,
        "dtype": torch.float32,
    }
    return tiny_llama(**sizes | changes)


def train(setting: Setting, *, out: str | None = None, **options: Any) -> tuple[Any, Recorder]:
    """Train updates of all rows, cut in four; return the trainer and the gradients."""
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "model": small_llama(),
            "effective_batch_size": NUM_ROWS,
            "per_device_train_batch_size": 3,
            "max_steps": 1,
            "use_cpu": setting.is_rehearsal,
        }
        rows, resume = options.pop("rows", ROWS), options.pop("resume", None)
        trainer = make_trainer(out or folder, rows, callbacks=[recorder], **settings | options)
        trainer.train(resume)
    return trainer, recorder


def whole(setting: Setting, model: torch.nn.Module | None = None) -> Gradient:
    """The gradient of all rows at once, in float32 on the device."""
    model = (small_llama() if model is None else model).to(setting.device).train()
    batch = {key: value.to(setting.device) for key, value in pad(ROWS).items()}
    return on_host(reference.weighted_gradient(model, [batch], [1.0]))


def on_host(gradient: Gradient) -> Gradient:
    """Copy a gradient to the host in float64, without the prefixes of wrappers."""
    found = {}
    for name, value in gradient.items():
        for prefix in ("module.", "_orig_mod."):
            name = name.replace(prefix, "")
        found[name] = value.double().cpu()
    return found


def off(actual: Gradient, expected: Gradient, *, limit: float) -> float:
    """Return how far a gradient is off; fail above a limit."""
    error = reference.relative_error(on_host(actual), expected)
    assert error <= limit, f"the gradient is {error:.2e} off"
    return error


def log_row(setting: Setting) -> dict[str, Any]:
    """Log rows carry what the device tells: phases that add up, peak memory, MFU."""
    trainer, _ = train(setting, max_steps=4, logging_steps=2)
    row = log_rows(trainer)[-1]
    phases = sum(row[key] for key in PHASE_KEYS.values())
    assert all(row[key] >= 0 for key in PHASE_KEYS.values()), row
    assert 0.5 * row["step_seconds"] <= phases <= 1.1 * row["step_seconds"] + 1e-3, row
    figures = {"step seconds": row["step_seconds"], "phases": phases}
    if not setting.is_rehearsal:
        assert row["peak_memory_bytes"] > 0
        if peak_flops_of_this_device(trainer.args, trainer.model) is None:
            figures["mfu"] = f"no peak known of {torch.cuda.get_device_name(0)}"
        else:
            assert 0 < row["mfu"] < 1, row["mfu"]
            figures["mfu"] = row["mfu"]
    return figures


def tuned_budget(setting: Setting) -> dict[str, Any]:
    """A budget tunes itself by the device's time, and is remembered under the device's name."""
    with tempfile.TemporaryDirectory() as home:
        from huggingface_hub import constants

        before, constants.HF_HOME = constants.HF_HOME, home
        try:
            trainer, _ = train(
                setting,
                rows=ragged_rows(24 * NUM_ROWS, seed=5),
                max_steps=24,
                max_tokens_per_micro_batch="auto",
                remember_tuned_budget=True,
            )
            written = next(Path(home).rglob("token_budgets.json"), None)
            text = "" if written is None else written.read_text()
        finally:
            constants.HF_HOME = before
    tuner = trainer.token_budget.tuner
    assert tuner is not None
    assert tuner.settled, "24 updates did not settle it"
    name = "cpu" if setting.is_rehearsal else torch.cuda.get_device_name(0)
    assert name in text, text
    return {"budget": tuner.tokens}


def workers(setting: Setting) -> dict[str, Any]:
    """Loader workers, forked after CUDA has begun, give the same gradient through pinned memory."""
    _, recorder = train(setting, dataloader_num_workers=2, dataloader_pin_memory=True)
    return {"off": off(recorder.gradients[0], whole(setting), limit=IN_FLOAT32)}


def dropout(setting: Setting) -> dict[str, Any]:
    """Two runs from one seed draw the same masks on the device, another seed draws others."""
    found = []
    for seed in (1, 1, 2):
        model = small_llama(attention_dropout=0.3, attn_implementation="eager")
        _, recorder = train(setting, model=model, seed=seed)
        found.append(on_host(recorder.gradients[0]))
    same = reference.relative_error(found[1], found[0])
    other = reference.relative_error(found[2], found[0])
    assert same <= 1e-6, same
    assert other > 1e-3, other
    return {"same seed": same, "other seed": other}


def checkpointing(setting: Setting) -> dict[str, Any]:
    """Activations computed twice give the same gradient, with either kind of checkpoint."""
    figures = {}
    for reentrant in (False, True):
        _, recorder = train(
            setting,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        name = "reentrant" if reentrant else "plain"
        figures[name] = off(recorder.gradients[0], whole(setting), limit=IN_FLOAT32)
    return figures


def resume(setting: Setting) -> dict[str, Any]:
    """A run that goes on from a checkpoint ends with the bits of one that was not broken off."""

    def run(out: str, **options: Any) -> Gradient:
        model = small_llama(attention_dropout=0.2, attn_implementation="eager")
        trainer, _ = train(
            setting,
            out=out,
            rows=ragged_rows(48, seed=7),
            model=model,
            max_steps=4,
            optim="adamw_torch",
            learning_rate=1e-3,
            **options,
        )
        return {n: p.detach().cpu() for n, p in trainer.model.named_parameters()}

    with tempfile.TemporaryDirectory() as folder:
        straight = run(f"{folder}/a", save_strategy="steps", save_steps=2)
        again = run(f"{folder}/b")
        shutil.copytree(f"{folder}/a/checkpoint-2", f"{folder}/c/checkpoint-2")
        resumed = run(f"{folder}/c", resume=f"{folder}/c/checkpoint-2")
    repeats = all(torch.equal(again[name], weight) for name, weight in straight.items())
    bits = all(torch.equal(resumed[name], weight) for name, weight in straight.items())
    error = reference.relative_error(on_host(resumed), on_host(straight))
    assert error <= 1e-6, f"{error:.1e} off"
    assert bits or not repeats, "runs repeat to the bit here, but the resumed one does not"
    return {"two runs to the bit": repeats, "resumed to the bit": bits, "off": error}


def fp16(setting: Setting) -> dict[str, Any]:
    """Float16 with a loss scale: it is found, updates go through, and the gradient is right."""
    setting.needs_cuda("accelerate has no loss scale on a CPU")
    trainer, recorder = train(
        setting, fp16=True, max_steps=24, max_grad_norm=1e9, learning_rate=0.0, num_train_epochs=24
    )
    scale = trainer.accelerator.scaler.get_scale()
    gradients = [on_host(gradient) for gradient in recorder.gradients]
    finite = [g for g in gradients if all(v.isfinite().all() for v in g.values())]
    assert len(finite) >= 4, f"{len(finite)} of {len(gradients)} updates were finite"
    error = reference.relative_error(finite[-1], whole(setting))
    assert error <= 2e-2, f"the gradient is {error:.2e} off"
    assert math.isfinite(scale)
    assert scale >= 1
    return {"scale": scale, "finite": f"{len(finite)} of {len(gradients)}", "off": error}


def tf32(setting: Setting) -> dict[str, Any]:
    """TF32, set by the arguments: rows are logged, and their MFU is against TF32's peak."""
    exact = whole(setting)
    options = {} if setting.is_rehearsal else {"tf32": True}
    trainer, recorder = train(setting, max_steps=2, **options)
    row = log_rows(trainer)[-1]
    error = off(recorder.gradients[0], exact, limit=1e-2)
    assert setting.is_rehearsal or error > IN_FLOAT32 / 10, f"TF32 seems to be off: {error:.1e}"
    peak = peak_flops_of_this_device(trainer.args, trainer.model)
    assert not trainer.facts.warnings, trainer.facts.warnings
    assert trainer.shortcuts.chunked_loss, trainer.shortcuts.refused
    assert math.isfinite(row["loss"])
    return {"off": error, "peak TFLOPS": None if peak is None else peak / 1e12}


def compiled(setting: Setting) -> dict[str, Any]:
    """A compiled model gives the same gradients, with few graphs for many shapes."""
    from torch._dynamo.utils import counters

    backend = "eager" if setting.is_rehearsal else "inductor"
    if backend == "inductor" and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        raise SkippedCheckError("no C compiler, which inductor needs")
    torch._dynamo.reset()
    counters.clear()
    options: dict[str, Any] = {
        # Else torch_compile switches TF32 on where there is, for the whole process.
        **({} if setting.is_rehearsal else {"tf32": False}),
        "rows": ragged_rows(36, seed=1, longest=40),
        "max_tokens_per_micro_batch": 100,
        "max_steps": 3,
        "data_collator": pad,
    }
    _, found = train(
        setting,
        model=small_llama(num_hidden_layers=1),
        torch_compile=True,
        torch_compile_backend=backend,
        **options,
    )
    graphs = counters["stats"]["unique_graphs"]
    _, plain = train(setting, model=small_llama(num_hidden_layers=1), **options)
    pairs = zip(found.gradients, plain.gradients, strict=True)
    errors = [off(actual, on_host(expected), limit=1e-4) for actual, expected in pairs]
    assert 1 <= graphs <= 3, graphs
    return {"graphs": graphs, "off": max(errors)}


def verify(setting: Setting) -> dict[str, Any]:
    """`verify_parity` finds the device by itself and passes."""
    with tempfile.TemporaryDirectory() as out:
        arguments = GradAccArguments(
            output_dir=out,
            effective_batch_size=NUM_ROWS,
            per_device_train_batch_size=3,
            report_to="none",
            use_cpu=setting.is_rehearsal,
        )
        report = verify_parity(small_llama(), ROWS, arguments=arguments, data_collator=pad)
    assert report.passed, report
    return {"passed": report.passed}


def non_finite(setting: Setting) -> dict[str, Any]:
    """A NaN on the device is an error that names its row."""
    from support.failing import POISON, Poisoned

    rows = [{**row, "input_ids": list(row["input_ids"])} for row in ROWS]
    rows[4]["input_ids"][0] = POISON
    try:
        train(setting, rows=rows, trainer_class=Poisoned)
    except NonFiniteError as error:
        text = str(error)
    else:
        raise AssertionError("no error")
    assert "4" in text, text
    return {"said": text.splitlines()[0][:120]}


def noise_scale(setting: Setting) -> dict[str, Any]:
    """The gradient noise scale is measured, and its rows are finite."""
    trainer, _ = train(
        setting, rows=ragged_rows(8 * NUM_ROWS, seed=6), max_steps=8, noise_scale_every=1
    )
    rows = log_rows(trainer)
    keys = [key for key in rows[-1] if "noise" in key]
    assert keys, rows[-1]
    return {key: rows[-1][key] for key in keys}


os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else products may differ by run
