"""The command line: train, plan, verify, report, recipes, schema.

Heavy imports are inside the commands, so that `--help` answers at once. Exit codes: 0 done,
1 a check failed, 2 the recipe, data or options need a correction, 130 interrupted.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hf_gradacc import __version__
from hf_gradacc.errors import GradAccError
from hf_gradacc.recipe.shipped import find_recipe, recipes_app
from hf_gradacc.safety.storage_errors import find_errno
from hf_gradacc.text import printable

if TYPE_CHECKING:
    from hf_gradacc.recipe.sections import Recipe

__all__ = ["app", "main", "plan", "report", "schema", "train", "verify"]

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
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Override keys, such as train.max_steps=50."),
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


def _load(
    recipe: str, overrides: list[str] | None, allow_env: list[str] | None, *, trusted: bool
) -> Recipe:
    from hf_gradacc.recipe.load import load_recipe

    return load_recipe(
        find_recipe(recipe),
        overrides=overrides or [],
        allow_env=allow_env or [],
        trust_remote_code=trusted,
    )


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


@app.command()
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
) -> None:
    """Train as a recipe says; save model, tokenizer and the completed recipe.

    **Examples**

    - `hf-gradacc train quickstart`

    - `hf-gradacc train recipes/quickstart.yaml peft=lora train.max_steps=50`

    - `torchrun --nproc-per-node 8 -m hf_gradacc train qwen3/4b_full_chat_ddp`

    - `accelerate launch -m hf_gradacc train qwen3/8b_full_chat_fsdp2 --resume`
    """
    from hf_gradacc.recipe.folder import claim_folder
    from hf_gradacc.recipe.run import train_recipe
    from hf_gradacc.recipe.sections import HEADS

    given = [*(overrides or []), *(["output.overwrite=true"] if overwrite else [])]
    loaded = _load(recipe, given, allow_env, trusted=trust_remote_code)
    claim_folder(loaded, resume=resume)
    if verify_first:
        from hf_gradacc.recipe.verifying import verify_recipe

        report = verify_recipe(loaded)
        print(printable(str(report)))
        if not report.passed:
            raise typer.Exit(1)
    result = train_recipe(loaded, resume=resume)
    if result.trainer.is_world_process_zero():
        if "eval_loss" in result.metrics:
            print(f"held-out loss {result.metrics['eval_loss']:.4f}")
        print(f"saved: {printable(str(result.folder))}")
        kind = "transformers.AutoModel" if loaded.peft.saves_whole_model else "peft.AutoPeftModel"
        print(f'load it: {kind}{HEADS[loaded.model.task]}.from_pretrained("{result.folder}")')


@app.command()
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
) -> None:
    """Show the updates of a recipe before any weight is loaded, and what to change.

    **Examples**

    - `hf-gradacc plan quickstart`

    - `hf-gradacc plan qwen3/8b_full_chat_fsdp2 --world-size 8 --png plan.png`

    - `hf-gradacc plan my.yaml peft=lora --gpu-memory 24`

    - `hf-gradacc plan my.yaml --show-rows 3`

    - `hf-gradacc plan my.yaml --measure --price-per-hour 2.5`
    """
    from hf_gradacc.recipe.plan_screen import show_plan

    loaded = _load(recipe, overrides, allow_env, trusted=trust_remote_code)
    # Without a terminal, as in a pipe or a log, rich would use 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 110)
    show_plan(
        loaded,
        world_size=world_size,
        gpu_memory=None if gpu_memory is None else gpu_memory * 1e9,
        png=png,
        num_rows=show_rows,
        measures=measure,
        price_per_hour=price_per_hour,
        console=console,
    )


@app.command()
def verify(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=2, help="Rows to compare gradients on.")] = 16,
    preflight: Annotated[
        bool, typer.Option(help="Also run the longest rows once, and measure memory.")
    ] = True,
    allow_env: AllowEnv = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Check on your own model and rows that accumulation is exact. Exit code 1 if it is not.

    Compares the gradient our plan accumulates with that of all rows at once, and shows what the
    stock Trainer would have given.

    **Examples**

    - `hf-gradacc verify quickstart`

    - `hf-gradacc verify my.yaml --rows 32 --no-preflight`
    """
    from hf_gradacc.recipe.verifying import verify_recipe

    loaded = _load(recipe, overrides, allow_env, trusted=trust_remote_code)
    report = verify_recipe(loaded, num_rows=rows, preflight=preflight)
    print(printable(str(report)))
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of one run or several.")],
    html: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option(help="Also draw the plots into this file.")] = None,
) -> None:
    """Write a page about runs, from their own files and without a network.

    **Example**

    - `hf-gradacc report runs/quickstart --html report.html`
    """
    from hf_gradacc.tracking.report import build_report

    build_report(runs, html=html, png=png)
    print(f"written: {html}" + (f", {png}" if png else ""))


@app.command()
def schema(
    out: Annotated[Path | None, typer.Argument(help="File to write; none prints it.")] = None,
) -> None:
    """Export the JSON schema of recipes, by which editors complete and check them.

    **Example**

    - `hf-gradacc schema recipe.schema.json`, and as the first line of a recipe:
      `# yaml-language-server: $schema=recipe.schema.json`
    """
    from hf_gradacc.recipe.schema import export_schema

    text = json.dumps(export_schema(), indent=2) + "\n"
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")
        print(f"written: {out}")


def main() -> None:
    """Run the command line; a user's mistake prints a message and exits with 2, no traceback."""
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
        if text is None:
            raise
        print(f"error: {printable(text)}", file=sys.stderr)
        sys.exit(2)


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
