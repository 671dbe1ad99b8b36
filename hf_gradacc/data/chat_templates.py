"""Chat templates by name: a tokenizer's own, those of `templates/`, a file's, or Jinja text.

Every template of `templates/` marks the assistant's turns with `{% generation %}`, their end
included, and was compared with the family it is named after. Its first line says which tokens a
vocabulary has to have for it.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from hf_gradacc.data.section import DataSection
from hf_gradacc.errors import ConfigError
from hf_gradacc.text import nearest

__all__ = [
    "check_template_options",
    "is_template_path",
    "set_chat_template",
    "shipped_template",
    "shipped_templates",
]

_NEEDS = re.compile(r"\{#- needs: (.*?) -#\}")
_SUFFIXES = (".jinja", ".jinja2", ".j2", ".txt", ".json")


@cache
def shipped_templates() -> tuple[str, ...]:
    """Names of the templates that come with this package, sorted."""
    folder = files("hf_gradacc.data") / "templates"
    names = (entry.name for entry in folder.iterdir())
    return tuple(sorted(name.removesuffix(".jinja") for name in names if name.endswith(".jinja")))


def shipped_template(name: str) -> str:
    """Text of a template that comes with this package."""
    file = files("hf_gradacc.data") / "templates" / f"{name}.jinja"
    return file.read_text(encoding="utf-8")


def is_template_path(template: str) -> bool:
    """Whether `tokenizer.chat_template` can only be meant as a file: not Jinja, nor a bare name.

    >>> [is_template_path(text) for text in ("chatml", "mine.jinja", "./mine", "{{ messages }}")]
    [False, True, True, False]
    """
    if "{" in template:
        return False
    return any(mark in template for mark in "/\\~") or template.endswith(_SUFFIXES)


def set_chat_template(tokenizer: Any, wanted: str) -> None:
    """Give a tokenizer the chat template that a recipe asks for.

    Args:
        tokenizer: A transformers tokenizer; tokens to add have been added.
        wanted: `tokenizer.chat_template`: Jinja text, one of the names under which the tokenizer
            keeps several templates, the name of a shipped one, or the path of a file.

    Raises:
        ConfigError: If there is no such template, or the vocabulary lacks tokens of a shipped one.
    """
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if "{" in wanted:
        tokenizer.chat_template = wanted
    elif wanted in own:
        tokenizer.chat_template = own[wanted]
    elif wanted in shipped_templates():
        template = shipped_template(wanted)
        _check_tokens(tokenizer, wanted, template)
        tokenizer.chat_template = template
    else:
        tokenizer.chat_template = _read_file(wanted, [*sorted(own), *shipped_templates()])


def check_template_options(tokenizer: Any, section: DataSection) -> None:
    """Refuse what only a chat template reads, if there is none or it does not read it.

    Args:
        tokenizer: The tokenizer of the run.
        section: The recipe's `data`.

    Raises:
        ConfigError: Naming the key.
    """
    template = tokenizer.chat_template
    if template is None:
        fields = type(section).model_fields
        for name in ("template_options", "assistant_turns", "roles_to_train"):
            default = fields[name].get_default(call_default_factory=True)
            if getattr(section, name) != default:
                raise ConfigError(
                    f"data.{name} = {getattr(section, name)!r} belongs to a chat template, and the "
                    "tokenizer has none: set tokenizer.chat_template, or leave it out."
                )
        return
    text = template if isinstance(template, str) else " ".join(template.values())
    words = set(re.findall(r"\w+", text))
    for name in section.template_options:
        if name not in words:
            guess = nearest(name, words)
            hint = f"did you mean {guess}?" if guess else "leave it out."
            raise ConfigError(
                f"data.template_options.{name} = {section.template_options[name]!r} is not read by "
                f"the chat template: {hint}"
            )


def _check_tokens(tokenizer: Any, name: str, template: str) -> None:
    """A mark that is no token falls into letters, and a model does not learn to stop at it."""
    found = _NEEDS.search(template)
    known = tokenizer.get_vocab()
    missing = [token for token in (found[1].split() if found else []) if token not in known]
    if "eos_token" in template and tokenizer.eos_token is None:
        raise ConfigError(
            f"tokenizer.chat_template = {name!r} ends with the end-of-text token, and the "
            "tokenizer has none: set tokenizer.eos_token."
        )
    if missing:
        raise ConfigError(
            f"tokenizer.chat_template = {name!r} needs tokens that the vocabulary lacks: list "
            f"them in tokenizer.add_tokens: {missing}, or use a template that fits the model."
        )


def _read_file(wanted: str, names: list[str]) -> str:
    try:
        return Path(wanted).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        guess = nearest(wanted, names)
        hint = f"did you mean {guess}? There are" if guess else "the names are"
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"tokenizer.chat_template = {wanted!r} is neither a template's name nor a file that "
            f"can be read ({why}): {hint} {', '.join(dict.fromkeys(names))}; or write Jinja text, "
            "or the path of a file that holds it."
        ) from error
