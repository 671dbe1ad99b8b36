"""Questions as plain text, for tokenizers without a chat template: in training and when asked."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["gap_behind", "plain_instruction", "plain_prompt", "plain_question"]


def plain_question(question: str) -> str:
    """Write a question of `question_answer`.

    >>> plain_question("2+2?")
    'Question: 2+2?\\nAnswer:'
    """
    # No blank behind the colon: with the answer's first letter it would make another token.
    return f"Question: {question}\nAnswer:"


def plain_instruction(instruction: str, context: str = "") -> str:
    """Write an instruction and its input, in Alpaca's words.

    >>> plain_instruction("Add.", "2, 2")
    '### Instruction:\\nAdd.\\n\\n### Input:\\n2, 2\\n\\n### Response:\\n'
    """
    given = f"### Input:\n{context}\n\n" if context else ""
    return f"### Instruction:\n{instruction}\n\n{given}### Response:\n"


def gap_behind(prompt: str) -> str:
    """What stands between a prompt and its answer."""
    return "" if prompt.endswith("\n") else " "


def plain_prompt(
    prompt: str, *, past: Sequence[tuple[str, str]] = (), system: str | None = None
) -> str:
    """Put what was said before in front of a prompt.

    Args:
        prompt: The last one, as `plain_question` or `plain_instruction` write it.
        past: Earlier prompts, written alike, and their answers.
        system: A text before all of them.

    >>> plain_prompt("Q: c", past=[("Q: a", "b")], system="Be brief.")
    'Be brief.\\n\\nQ: a b\\n\\nQ: c'
    """
    before = "" if system is None else f"{system}\n\n"
    before += "".join(f"{asked}{gap_behind(asked)}{said}\n\n" for asked, said in past)
    return before + prompt
