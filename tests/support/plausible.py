"""Recipes as people write them, with a key too many or a wrong value; and damaged data files."""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import json
import random
from pathlib import Path
from typing import Any

from support.bytes_tokenizer import bytes_tokenizer
from support.every_key import ARGUMENTS, CASES, PLAIN, make, other_value, resolve
from support.fuzzing import _VALUES, alarm, spoil

from hf_gradacc import GradAccArguments, GradAccError
from hf_gradacc.data import prepare_data
from hf_gradacc.data.section import FORMAT_COLUMNS, DataSection

SECONDS = 20.0

_FIELDS = {field.name: field for field in dataclasses.fields(GradAccArguments)}
_SKIPPED = {"deepspeed", "push_to_hub", "report_to", "resume_from_checkpoint", "use_cpu", "fsdp"}
_SKIPPED |= {"output_dir", "run_name", "project", "hub_token", "local_rank", "parallelism_config"}
_SKIPPED |= {"torch_compile_backend", "torch_compile_mode", "debug"}

OF_SOME_ROWS = {"data.unusable", "data.too_long", "data.max_length", "data.max_target_length"}
OF_SOME_ROWS |= {"data.mix", "data.assistant_turns", "data.roles_to_train", "data.seed"}
OF_SOME_ROWS |= {"data.train[0].weight", "data.train[0].split"}
OF_SOME_ROWS |= {"train.disable_tqdm"}  # its default is what the log level says
"""Keys that say what happens to rows of a kind: whether there are any, only the rows tell."""


def _draw_key(draw: random.Random) -> tuple[str, Any, dict[str, Any]]:
    if draw.random() < 0.5:
        key = draw.choice(list(CASES))
        return (key, *CASES[key])
    name = draw.choice(sorted(set(_FIELDS) - _SKIPPED))
    value, context = ARGUMENTS.get(name) or (None, {})
    if value is None:
        try:
            value = other_value(_FIELDS[name])
        except KeyError:
            value = "other"
    return f"train.{name}", value, context


def draw_changes(seed: int) -> tuple[dict[str, Any], list[str]]:
    """Changes of a plain recipe, and those of its keys that have a value of the table."""
    draw = random.Random(seed)
    changes: dict[str, Any] = {}
    of_table: list[str] = []
    for _ in range(draw.randint(1, 4)):
        key, value, context = _draw_key(draw)
        if draw.random() < 0.7:
            changes |= copy.deepcopy(context)
        if draw.random() < 0.2:
            value = draw.choice([*_VALUES, 0, 1, 2, 0.5, "x", ["x"], {"x": 1}])
        else:
            of_table.append(key)
        changes[key] = copy.deepcopy(value)
    return changes, [key for key in dict.fromkeys(of_table) if key in changes]


def try_plausible(seed: int, folder: Path) -> str:
    """Resolve one recipe: "resolved", "refused" or "IDLE" with a key that changes nothing."""
    changes, of_table = draw_changes(seed)
    try:
        with alarm(SECONDS):
            found = resolve(make(folder, PLAIN, changes))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        if _is_of_make(error):
            return "impossible"
        raise
    except GradAccError as error:
        return "FAILED escape" if "\x1b" in str(error) else "refused"
    for key in of_table:
        without = {name: value for name, value in changes.items() if name != key}
        if key in OF_SOME_ROWS or any(name.startswith(key) for name in without):
            continue
        try:
            with alarm(SECONDS):
                if resolve(make(folder, PLAIN, without)) == found:
                    return f"IDLE {key}"
        except GradAccError:
            pass
        break
    return "resolved"


def _is_of_make(error: BaseException) -> bool:
    """Whether the changes themselves could not be laid over each other."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_name == "make"


def _cells(name: str, number: int) -> Any:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"{number} é"}]
    special = {"messages": turns, "input_ids": [5, 6, number], "label": f"class {number % 2}"}
    return special.get(name, f"{name} {number}, \u201cquoted\u201d")


def write_data(seed: int, folder: Path) -> tuple[Path, str]:
    """A data file, damaged as disks and hands do, and the format it is for."""
    draw = random.Random(seed)
    format = draw.choice(list(FORMAT_COLUMNS))
    rows = [{name: _cells(name, n) for name in FORMAT_COLUMNS[format]} for n in range(5)]
    kind = draw.choice(("jsonl", "json", "csv", "tsv", "txt", "md", "parquet", "arrow"))
    if kind == "jsonl":
        content = "\n".join(json.dumps(row) for row in rows).encode()
    elif kind == "json":
        content = json.dumps(rows).encode()
    elif kind in ("csv", "tsv"):
        text = io.StringIO()
        table = csv.DictWriter(text, list(rows[0]), delimiter="," if kind == "csv" else "\t")
        table.writeheader()
        table.writerows(rows)
        content = text.getvalue().encode()
    elif kind in ("txt", "md"):
        content = "\n\n".join(str(row) for row in rows).encode()
    else:
        content = _binary(rows, kind)
    if draw.random() < 0.85:
        content = spoil(content, draw)
    file = folder / f"rows-{seed}.{kind}"
    file.write_bytes(content)
    return file, format


def _binary(rows: list[dict[str, Any]], kind: str) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table, sink = pa.Table.from_pylist(rows), io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, sink)
    else:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


def try_data(seed: int, folder: Path) -> str:
    """Prepare one file: "read" or "refused"; anything else is raised."""
    file, format = write_data(seed, folder)
    values = {"train": str(file), "format": format, "streaming": seed % 3 == 0}
    try:
        with alarm(SECONDS):
            data = prepare_data(DataSection.model_validate(values), tokenizer=_tokenizer())
            for _ in data.train:
                pass
    except GradAccError as error:
        return "FAILED escape" if "\x1b" in str(error) else "refused"
    return "read"


def _tokenizer() -> Any:
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer
