"""`hf-gradacc chat`: talk to a model on a terminal, or ask it one thing from a script.

On a terminal what the user reads goes to the standard output. Of one prompt, only the answer does,
so that it can be piped on; what is said about it goes to the standard error.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection
from typing import Any

from hf_gradacc.after.asking import Asking, Exchange, choose_asking
from hf_gradacc.after.saved import SavedModel, find_saved, load_saved, load_tokenizer_of
from hf_gradacc.errors import ConfigError
from hf_gradacc.text import printable

__all__ = ["Chat", "chat_with"]


def chat_with(
    run: str,
    *,
    prompt: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float | None = None,
    allow_env: Collection[str] = (),
    trust_remote_code: bool = False,
) -> bool:
    """Answer one prompt, or all that a user types.

    Args:
        run: The folder of a run, a checkpoint or a saved model.
        prompt: The one prompt; None reads the standard input: as one prompt if it is a pipe or a
            file, line by line if it is a terminal.
        system: A system turn in place of the recipe's.
        max_new_tokens: Longest answer, in tokens.
        temperature: See `generation_settings`.
        allow_env: Variables that the recipe may read.
        trust_remote_code: Let the model run code of its repository, if the recipe says so too.

    Returns:
        False if Ctrl-C ended the one answer.

    Raises:
        ConfigError: If there is no model, or it cannot be asked in this way.
    """
    saved = find_saved(run, allow_env=allow_env, trust_remote_code=trust_remote_code)
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
        prompt = prompt.removesuffix("\n")
    if prompt is not None and not prompt:
        raise ConfigError("the prompt is empty: give --prompt TEXT, or pipe a text in.")
    chat = Chat(saved, system=system, max_new_tokens=max_new_tokens, temperature=temperature)
    if prompt is not None:
        return chat.say(prompt)
    chat.talk()
    return True


class Chat:
    """A loaded model, and what was said to it so far.

    Args:
        saved: The model.
        system: A system turn in place of the recipe's.
        max_new_tokens: Longest answer, in tokens.
        temperature: See `generation_settings`.

    Attributes:
        model: The model.
        asking: How prompts are written; None for a model that classifies.
        past: The exchanges that stand before the next prompt.
    """

    def __init__(
        self,
        saved: SavedModel,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        temperature: float | None = None,
    ) -> None:
        from hf_gradacc.after.answering import generation_settings

        if saved.task == "reward":
            raise ConfigError(
                f"{saved.folder} holds a reward model, which scores a prompt with its answer, and "
                "chat takes prompts alone: load it with AutoModelForSequenceClassification, and "
                "give it the tokens of apply_chat_template."
            )
        if saved.classifies and system is not None:
            raise ConfigError(f"--system = {system!r} has no place: this model gives classes.")
        self.tokenizer = load_tokenizer_of(saved)
        self.asking: Asking | None = None
        if not saved.classifies:
            self.asking = choose_asking(saved, tokenizer=self.tokenizer, system=system)
        self.model = load_saved(saved, tokenizer=self.tokenizer)
        self.past: list[Exchange] = []
        self._saved, self._max_new_tokens = saved, max_new_tokens
        self._settings: Any = None
        if not saved.classifies:
            self._settings = generation_settings(self.model, temperature=temperature)

    def say(self, prompt: str) -> bool:
        """Print what the model makes of a prompt, and remember it.

        Returns:
            False if Ctrl-C ended the answer.

        Raises:
            ConfigError: If the prompt cannot be asked.
        """
        if self.asking is None:
            self._classify(prompt)
            return True
        from hf_gradacc.after.answering import generate

        answer = generate(
            self.model,
            self.asking.encode(prompt, past=self.past),
            tokenizer=self.tokenizer,
            settings=self._settings,
            max_new_tokens=self._max_new_tokens,
            show=lambda text: print(printable(text), end="", flush=True),
        )
        print()
        if answer.interrupted:
            _remark("stopped; what was said is kept")
        if answer.cut_at is not None:
            _remark(f"cut off after {answer.cut_at} tokens; see --max-new-tokens")
        if self.asking.remembers:
            self.past.append((prompt, answer.text.strip()))
        return not answer.interrupted

    def talk(self) -> None:
        """Answer what is typed until Ctrl-D or /exit."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - lets `input` edit lines and recall earlier ones
        what = "a text, its classes out" if self.asking is None else str(self.asking)
        print(printable(f"{self._saved.folder}: {what}"))
        print("/new forgets what was said, /exit or Ctrl-D leaves, Ctrl-C stops an answer")
        while True:
            try:
                typed = input("> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:  # a line that was begun is dropped, as in a shell
                print()
                continue
            if typed.strip() == "/exit":
                return
            if typed.strip() == "/new":
                self.past.clear()
            elif typed.strip():
                try:
                    self.say(typed)
                except ConfigError as error:
                    _remark(str(error))

    def _classify(self, text: str) -> None:
        from hf_gradacc.after.answering import classify

        for name, share in classify(self.model, text, tokenizer=self.tokenizer):
            print(f"{share:8.4f}  {printable(name)}")


def _remark(text: str) -> None:
    print(f"({printable(text)})", file=sys.stderr, flush=True)
