"""The command line: train, plan, verify, sweep, report, recipes, schema, chat, merge, push, import.

Heavy imports are inside the commands, so that `--help` answers at once. Exit codes: 0 done,
1 a check failed, 2 the recipe, data or options need a correction, 70 a fault of ours, 130
interrupted.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hf_gradacc import __version__
from hf_gradacc.errors import ConfigError, GradAccError
from hf_gradacc.recipe.shipped import find_recipe, recipes_app
from hf_gradacc.recipe.streams import Output, opened_output
from hf_gradacc.safety.storage_errors import find_errno
from hf_gradacc.safety.unexpected import UNEXPECTED_EXIT_CODE, explain_unexpected
from hf_gradacc.text import nearest, printable

if TYPE_CHECKING:
    from hf_gradacc.recipe.keys.sections import Recipe

__all__ = [
    "app",
    "chat",
    "import_recipe",
    "main",
    "merge",
    "plan",
    "push",
    "report",
    "schema",
    "sweep",
    "train",
    "verify",
]

app = typer.Typer(
    name="hf-gradacc",
    help="Fine-tune with gradient accumulation that is exactly the gradient of the whole batch.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.add_typer(recipes_app, name="recipes")

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")
]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="The folder of a run, a checkpoint or a saved model.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Override keys, such as train.max_steps=50 or --train.max_steps=50.",
    ),
]
AllowEnv = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Let the recipe read this variable of the environment, too; may stand several times.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Let the recipe run Python code that its model's repository ships.",
    ),
]


Quiet = Annotated[
    bool, typer.Option("--quiet", help="Print results, warnings and errors, nothing else.")
]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json", help="Print results as lines of JSON, and everything else to standard error."
    ),
]
Timestamps = Annotated[
    bool, typer.Option("--timestamps", help="Begin each line for people with the time.")
]


_TAKES_KEYS = {"ignore_unknown_options": True}
"""`--key=value` is an override, which only the recipe knows."""


def _load(
    recipe: str, overrides: list[str] | None, allow_env: list[str] | None, *, trusted: bool
) -> Recipe:
    for text in overrides or []:
        if text.startswith("-") and "=" not in text:
            guess = nearest(text, _options_beside_keys())
            hint = (
                f"did you mean {guess}? An override is"
                if guess
                else "--help shows all; an override is"
            )
            raise ConfigError(f"{text}: no such option: {hint} key=value or --key=value.")
    from hf_gradacc.recipe.load import load_recipe

    return load_recipe(
        find_recipe(recipe),
        overrides=overrides or [],
        allow_env=allow_env or [],
        trust_remote_code=trusted,
    )


def _options_beside_keys() -> list[str]:
    """Return the options of all commands that take keys of a recipe, such as ``--resume``."""
    commands = typer.main.get_group(app).commands.values()
    taking_keys = [command for command in commands if command.context_settings == _TAKES_KEYS]
    params = [one for command in taking_keys for one in command.params]
    names = {name for one in params for name in (*one.opts, *one.secondary_opts)}
    return sorted(name for name in names | {"--help"} if name.startswith("--"))


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"hf-gradacc {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None: ...


@app.command(context_settings=_TAKES_KEYS)
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the output folder.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the run in the output folder, and nothing else."),
    ] = False,
    verify_first: Annotated[
        bool, typer.Option("--verify", help="Run `verify` before, and train only if it passes.")
    ] = False,
    allow_env: AllowEnv = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    timestamps: Timestamps = False,
) -> None:
    """Train as a recipe says.

    Saves model, tokenizer, the completed recipe and a model card.

    **Examples**

    - `hf-gradacc train quickstart`

    - `hf-gradacc train recipes/quickstart.yaml peft=lora train.max_steps=50`

    - `torchrun --nproc-per-node 8 -m hf_gradacc train qwen3/4b_full_chat_ddp`

    - `accelerate launch -m hf_gradacc train qwen3/8b_full_chat_fsdp2 --resume`
    """
    with opened_output(quiet=quiet, as_json=as_json, timestamps=timestamps) as output:
        from hf_gradacc.recipe.folder import claim_folder
        from hf_gradacc.recipe.keys.sections import HEADS
        from hf_gradacc.recipe.run import train_recipe

        given = [*(overrides or []), *(["output.overwrite=true"] if overwrite else [])]
        loaded = _load(recipe, given, allow_env, trusted=trust_remote_code)
        claim_folder(loaded, resume=resume)
        if verify_first:
            _verify(loaded, output)
        result = train_recipe(loaded, resume=resume, on_row=output.row)
        if not result.trainer.is_world_process_zero():
            return
        if "eval_loss" in result.metrics:
            output.say(f"held-out loss {result.metrics['eval_loss']:.4f}")
        output.say(f"saved: {printable(str(result.folder))}")
        if loaded.adapter_to_nothing:
            output.say(loaded.adapter_to_nothing)
        else:
            whole = loaded.peft.saves_whole_model
            kind = "transformers.AutoModel" if whole else "peft.AutoPeftModel"
            head = HEADS[loaded.model.task]
            output.say(f'load it: {kind}{head}.from_pretrained("{result.folder}")')
        output.row({"kind": "result", "folder": str(result.folder), "metrics": result.metrics})


def _verify(loaded: Recipe, output: Output, **options: Any) -> None:
    """Check a recipe, say what was found, and end the command with 1 if it failed."""
    from hf_gradacc.recipe.verifying import verify_recipe
    from hf_gradacc.tracking.run_files import to_json

    report = verify_recipe(loaded, **options)
    output.say(printable(str(report)))
    figures = to_json(dataclasses.asdict(report))
    output.row({"kind": "verify", "passed": report.passed, **figures})
    if not report.passed:
        raise typer.Exit(1)


@app.command(context_settings=_TAKES_KEYS)
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    world_size: Annotated[
        int, typer.Option(min=1, envvar="WORLD_SIZE", help="Ranks to plan for.")
    ] = 1,
    gpu_memory: Annotated[
        float | None,
        typer.Option(min=0.1, metavar="GB", help="Memory of a GPU; default: the first one's here."),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Also draw the plan into this file.")] = None,
    show_rows: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Also show the first N rows, their targets marked."),
    ] = 0,
    measure: Annotated[
        bool, typer.Option("--measure", help="Train 3 updates here, to tell how long a run takes.")
    ] = False,
    price_per_hour: Annotated[
        float | None,
        typer.Option(min=0, metavar="PRICE", help="What the machine costs; tells the run's cost."),
    ] = None,
    allow_env: AllowEnv = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Show the updates of a recipe, what they need, what to change.

    No weight is loaded, unless --measure asks for it.

    **Examples**

    - `hf-gradacc plan quickstart`

    - `hf-gradacc plan qwen3/8b_full_chat_fsdp2 --world-size 8 --png plan.png`

    - `hf-gradacc plan my.yaml peft=lora --gpu-memory 24`

    - `hf-gradacc plan my.yaml --show-rows 3`

    - `hf-gradacc plan my.yaml --measure --price-per-hour 2.5`
    """
    with opened_output(as_json=as_json) as output:
        from hf_gradacc.recipe.plan.screen import show_plan

        loaded = _load(recipe, overrides, allow_env, trusted=trust_remote_code)
        # Without a terminal, as in a pipe or a log, rich would use 80 columns.
        console = Console(width=None if sys.stdout.isatty() else 110)
        shown = show_plan(
            loaded,
            world_size=world_size,
            gpu_memory=None if gpu_memory is None else gpu_memory * 1e9,
            png=png,
            num_rows=show_rows,
            measures=measure,
            price_per_hour=price_per_hour,
            console=console,
        )
        output.row({"kind": "plan", **shown.figures()})


@app.command(context_settings=_TAKES_KEYS)
def verify(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=2, help="Rows to compare gradients on.")] = 16,
    preflight: Annotated[
        bool, typer.Option(help="Also run the longest rows once, and measure memory.")
    ] = True,
    allow_env: AllowEnv = None,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    timestamps: Timestamps = False,
) -> None:
    """Check on your model and rows that accumulation is exact.

    Exit code 1 if it is not.

    Compares the gradient our plan accumulates with that of all rows at once, and shows what the
    stock Trainer would have given.

    **Examples**

    - `hf-gradacc verify quickstart`

    - `hf-gradacc verify my.yaml --rows 32 --no-preflight`
    """
    with opened_output(quiet=quiet, as_json=as_json, timestamps=timestamps) as output:
        loaded = _load(recipe, overrides, allow_env, trusted=trust_remote_code)
        _verify(loaded, output, num_rows=rows, preflight=preflight)


@app.command()
def sweep(
    recipe: RecipeArgument,
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="The YAML file of a W&B sweep.")],
    allow_env: AllowEnv = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Check a W&B sweep against its recipe; print how to start it.

    **Example**

    - `hf-gradacc sweep mine.yaml mine_sweep.yaml`
    """
    from hf_gradacc.recipe.sweep import check_sweep, describe_sweep

    checked = check_sweep(
        recipe, file, allow_env=allow_env or [], trust_remote_code=trust_remote_code
    )
    for line in describe_sweep(checked):
        print(printable(line))


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Output folders of one run or several.")
    ],
    html: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option(help="Also draw the plots into this file.")] = None,
) -> None:
    """Write a page about runs.

    From their own files, and without a network.

    **Example**

    - `hf-gradacc report runs/quickstart --html report.html`
    """
    from hf_gradacc.tracking.report import build_report

    build_report(runs, html=html, png=png)
    print(f"written: {html}" + (f", {png}" if png else ""))


@app.command()
def chat(
    run: RunArgument,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Answer this one, and exit.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A system turn in place of the recipe's.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="0: the likeliest token each time. Default: as the model is set."),
    ] = None,
    allow_env: AllowEnv = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to a trained model, asked as its rows were written.

    Takes the folder of a run, an adapter's too, or of one of its checkpoints. A model that
    classifies prints its classes with their probabilities. A text that is piped in is one prompt.

    **Examples**

    - `hf-gradacc chat runs/quickstart`

    - `hf-gradacc chat runs/mine/checkpoint-200 --system "Be brief." --temperature 0`

    - `hf-gradacc chat runs/summaries < article.txt > summary.txt`
    """
    from hf_gradacc.after.chat import chat_with

    ended = chat_with(
        run,
        prompt=prompt,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        allow_env=allow_env or [],
        trust_remote_code=trust_remote_code,
    )
    if not ended:
        raise typer.Exit(130)


@app.command()
def merge(
    run: RunArgument,
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="The folder to make; default: RUN-merged."),
    ] = None,
    allow_env: AllowEnv = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Merge a run's adapter into its base.

    The result is one model that transformers loads alone.

    What was trained by QLoRA is merged into the base as it was before 4 bits. The saved model is
    read back and compared with the adapter. Nothing is overwritten.

    **Example**

    - `hf-gradacc merge runs/mine models/mine`
    """
    with opened_output() as output:
        from hf_gradacc.after.merge import merge_run

        merged = merge_run(run, out, allow_env=allow_env or [], trust_remote_code=trust_remote_code)
        if merged.was_quantized:
            output.say(
                "merged into the base before 4 bits: answers differ by what these had rounded"
            )
        moved = f"{merged.difference:.1g} ({merged.dtype})"
        output.say(f"its logits differ from the adapter's by {moved}")
        output.say(f"saved: {printable(str(merged.folder))}")


@app.command()
def push(
    run: RunArgument,
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Such as me/my-model.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a private repository, if there is none.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="A branch of it; default: main.")] = None,
    message: Annotated[str, typer.Option(help="The commit's message.")] = "Upload the model",
) -> None:
    """Push a run's model, card and recipe to the Hugging Face Hub.

    Weights, tokenizer, configs, card, plot and recipe are pushed, and nothing else: no checkpoint,
    optimizer, pickle, log or file of W&B. Log in with `hf auth login`, or set HF_TOKEN.

    **Example**

    - `hf-gradacc push runs/mine me/mine --private`
    """
    with opened_output() as output:
        from hf_gradacc.recipe.pushing import push_folder

        url = push_folder(
            Path(run), repository, private=private or None, revision=revision, message=message
        )
        output.say(f"pushed: {printable(url)}")


@app.command("import")
def import_recipe(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Of Axolotl or LLaMA-Factory.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The recipe to write; default: FILE's name, here."),
    ] = None,
    world_size: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that FILE was used with, to count an update's rows."),
    ] = None,
) -> None:
    """Make a recipe of a file of Axolotl or LLaMA-Factory.

    A comment says what became of each key without a counterpart. Secrets are not copied.

    **Examples**

    - `hf-gradacc import axolotl.yml -o mine.yaml`

    - `hf-gradacc import examples/train_lora/llama3_lora_sft.yaml --world-size 8`
    """
    from hf_gradacc.elsewhere.importing import import_file

    out = output or Path(f"{file.stem}.recipe.yaml")
    imported = import_file(file, out, world_size=world_size)
    print(printable(imported.describe(out)))
    if imported.problems:
        raise typer.Exit(1)


@app.command()
def schema(
    out: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="File to write; none prints it.")
    ] = None,
) -> None:
    """Export the JSON schema of recipes, for editors.

    With it they complete and check every key.

    **Example**

    - `hf-gradacc schema recipe.schema.json`, and as the first line of a recipe:
      `# yaml-language-server: $schema=recipe.schema.json`
    """
    from hf_gradacc.recipe.keys.schema import export_schema

    text = json.dumps(export_schema(), indent=2) + "\n"
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")
        print(f"written: {out}")


def main() -> None:
    """Run the command line; a user's mistake prints a message and exits with 2, no traceback.

    An error that nobody foresaw is one line, too, and exits with 70; its traceback is in a file.
    """
    try:
        app(prog_name="hf-gradacc")
    except GradAccError as error:
        print(f"error: {printable(_message_of(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        text = _explain_files(error)
        code = 2 if text is not None else UNEXPECTED_EXIT_CODE
        text = text or explain_unexpected(error, sys.argv)
        print(f"error: {printable(text)}", file=sys.stderr)
        sys.exit(code)


def _message_of(error: GradAccError) -> str:
    """Return an error's message; from a loader's worker it comes at the end of a traceback."""
    name = f"{type(error).__module__}.{type(error).__name__}: "
    text = str(error)
    return text.rpartition(name)[2].strip() if "Original Traceback" in text else text


def _explain_files(error: Exception) -> str | None:
    """Explain an error of a file or a disk; None for any other error."""
    # safetensors, arrow and torch wrap the system's error in exceptions of their own.
    number = find_errno(error)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE):
        where = getattr(error, "filename", None)
        return (
            f"{f'{where}: ' if where else ''}{os.strerror(number)}: free some space, set "
            "output.dir to another disk, or keep fewer checkpoints (train.save_total_limit); then "
            "go on with --resume."
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return None
