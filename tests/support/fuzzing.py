"""Recipes and run files as an enemy, or a failing disk, would write them."""

from __future__ import annotations

import copy
import json
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

SECRET = "PLANTED-b7f1"
VARIABLES = ("HF_TOKEN", "WANDB_API_KEY", "DATABASE_URL", "AWS_ACCESS_KEY_ID", "SSH_KEY", "MY_VAR")
"""Variables of the environment that hold the secret."""

RECIPE: dict[str, Any] = {
    "model": {"config": {"model_type": "llama", "hidden_size": 16}, "dtype": "float32"},
    "tokenizer": {"train": {"vocab_size": 400}, "add_tokens": ["<a>"], "chat_template": "{{ 1 }}"},
    "data": {
        "train": [{"path": "rows.jsonl", "weight": 2.0}, "rows.jsonl"],
        "holdout": 0.5,
        "format": "question_answer",
        "columns": {"question": "q"},
        "template_options": {"enable_thinking": False},
    },
    "peft": {"method": "lora", "r": 4, "modules_to_save": ["lm_head"], "options": {"bias": "none"}},
    "train": {"learning_rate": 0.001, "max_steps": 2, "warmup_steps": 1, "report_to": "none"},
    "wandb": {"project": "p", "tags": ["a"], "notes": "n"},
    "output": {"dir": "out"},
}
_NAMES = (*VARIABLES, "USER", "NOTHING", "${wandb.notes}", "'HF_TOKEN'", '"HF_TOKEN"')
_SHAPES = (
    "${{oc.env:{0}}}",
    "${{oc.env:NOTHING,{0}}}",
    "${{oc.env:NOTHING,${{oc.env:{0}}}}}",
    "${{oc.env:${{oc.env:{0}}}}}",
    "${{{0}}}",
    "\\${{oc.env:{0}}}",
    "\\\\${{oc.env:{0}}}",
    "${{oc.decode:${{oc.env:{0}}}}}",
    "x${{ oc.env : {0} }}y",
    "${{wandb.notes}}${{oc.env:{0}}}",
    "${{wandb}}{0}",
    "${{oc.env:{0}",
    "${{${{oc.env:{0}}}}}",
)
_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        10**18,
        1e308,
        float("nan"),
        "",
        " ",
        "a" * 5000,
        "\x1b[31m\x07",
        "é\u202e",
    ),
    *("../../etc/passwd", "/dev/zero", "\0", "~", "*" * 50, [], {}, [[]], {"a": {"b": [1]}}, "no"),
    *("{% for i in range(999999999) %}{% endfor %}", "[" * 50, "1e-3", "2024-01-01", "=", "!!x"),
)
_TEXTS = (
    "a: &a [*a]\n",
    "a: &a [x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\nd: &d [*c, *c, *c]\n" * 2,
    "".join(f"k{i}: &k{i} [{'*k' + str(i - 1) + ', ' if i else 'x, '}y]\n" for i in range(60)),
    "? [a]\n: b\n",
    "<<: {model: null}\n",
    "x: !!python/object/apply:os.system ['true']\n",
    "x: !!binary aGVsbG8=\n",
    "x: 2024-01-01\n",
    "x: " + "[" * 3000 + "\n",
    "x: 1" + ":59" * 3000 + "\n",
    "base: mine.yaml\n",
    "base: ${oc.env:HF_TOKEN}\n",
    "\t\n",
    "model: {trust_remote_code: true}\n",
    "train: {hub_token: " + SECRET[:7] + "}\n",
)


class TooSlowError(Exception):
    """A case took longer than any may."""


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise `TooSlowError` in a block that takes more time of a processor, or hangs for long."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TooSlowError

    timers = {signal.ITIMER_PROF: signal.SIGPROF, signal.ITIMER_REAL: signal.SIGALRM}
    before = {number: signal.signal(number, ring) for number in timers.values()}
    left = {
        timer: signal.setitimer(timer, seconds if timer == signal.ITIMER_PROF else 12 * seconds)
        for timer in timers
    }
    try:
        yield
    finally:
        for timer, number in timers.items():
            signal.setitimer(timer, *left[timer])
            signal.signal(number, before[number])


def hostile_recipe(seed: int) -> tuple[str, list[str]]:
    """The text of a recipe, and overrides of it."""
    draw = random.Random(seed)
    recipe = copy.deepcopy(RECIPE)
    if draw.random() < 0.25:  # one that may load, but for what it reads
        recipe["wandb"]["notes"] = draw.choice(_SHAPES).format(
            draw.choice(("USER", "wandb.project"))
        )
        recipe["output"]["dir"] = draw.choice(("${oc.env:USER}/x", "\\${oc.env:HF_TOKEN}", "out"))
        return yaml.safe_dump(recipe, allow_unicode=True), []
    for _ in range(draw.randint(1, 4)):
        parent: Any = recipe
        while True:
            keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
            if not keys:
                break
            key = draw.choice(keys)
            if isinstance(parent[key], dict | list) and draw.random() < 0.7:
                parent = parent[key]
                continue
            kind = draw.random()
            if kind < 0.45:
                parent[key] = draw.choice(_SHAPES).format(draw.choice(_NAMES))
            elif kind < 0.8:
                parent[key] = copy.deepcopy(draw.choice(_VALUES))
            else:
                value = parent.pop(key)
                if isinstance(parent, dict):
                    parent[draw.choice(("x", str(key) + "s", "__class__", "a" * 300))] = value
            break
    text = yaml.safe_dump(recipe, allow_unicode=True)
    if draw.random() < 0.3:
        text += draw.choice(_TEXTS)
    if draw.random() < 0.15:
        text = spoil(text.encode(), draw).decode("latin-1")
    overrides = []
    if draw.random() < 0.3:
        value = draw.choice(_SHAPES).format(draw.choice(_NAMES))
        key = draw.choice(("wandb.notes", "train.max_steps", "x", "data.train[0].path", "a[9]", ""))
        overrides.append(f"{key}={value}")
    return text, overrides


def spoil(content: bytes, draw: random.Random) -> bytes:
    """Damage bytes as disks and hands do."""
    for _ in range(draw.randint(1, 3)):
        at = draw.randint(0, max(len(content) - 1, 0))
        kind = draw.randint(0, 6)
        if kind == 0:
            content = content[:at]
        elif kind == 1:
            content = content[:at] + bytes(draw.randint(0, 255) for _ in range(5)) + content[at:]
        elif kind == 2:
            content = content[:at] + b"\0" * 64 + content[at + 64 :]
        elif kind == 3:
            content = content[:at] + content[at + draw.randint(1, 40) :]
        elif kind == 4:
            content = content[:at] + content[at : at + 200] * 2 + content[at + 200 :]
        elif kind == 5:
            old, new = draw.choice(((b"1", b"null"), (b":", b":["), (b"{", b"["), (b"e", b"NaN")))
            content = content.replace(old, new, draw.randint(1, 3))
        else:
            content = draw.choice((b"", b"[]", b"null", b"3", b'"\xff"', b"{}", b"[" * 9999))
    return content


def try_recipe(seed: int, folder: Path, load: Callable[..., Any]) -> str:
    """Load one hostile recipe: "loaded" or "refused"; anything else is raised.

    `load` returns whatever of a recipe is written out, as text.
    """
    text, overrides = hostile_recipe(seed)
    (folder / "rows.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    file = folder / "mine.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    from hf_gradacc import ConfigError

    try:
        with alarm(5.0):
            told, kind = load(file, overrides), "loaded"
    except ConfigError as error:
        told, kind = str(error), "refused"
    assert SECRET not in told, (seed, told)
    assert "\x1b" not in told, (seed, told)
    return kind


def spoil_run(seed: int, run: Path, folder: Path) -> None:
    """Copy a run's own files, one or two of them damaged."""
    draw = random.Random(seed)
    folder.mkdir()
    names = ["gradacc_log.jsonl", "gradacc_run.json", "gradacc_parity.json"]
    spoilt = draw.sample(names, draw.randint(1, 2))
    for name in names:
        if not (run / name).is_file():
            continue
        content = (run / name).read_bytes()
        if name in spoilt:
            content = spoil(content, draw)
        if draw.random() < 0.9:
            (folder / name).write_bytes(content)
    if draw.random() < 0.3:
        state = json.dumps({"log_history": [{"loss": 1.0, "step": 1}], "global_step": 1}).encode()
        (folder / "trainer_state.json").write_bytes(spoil(state, draw))
