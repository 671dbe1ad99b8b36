"""The tokenizer of a run: a model's own, or a small one trained on the rows themselves.

The stock collator that pads rows of a task.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hf_gradacc.data.chat_templates import set_chat_template
from hf_gradacc.data.progress import with_progress
from hf_gradacc.data.section import ModelSection, Task, TokenizerSection
from hf_gradacc.errors import ConfigError, DataError

__all__ = ["CHAT_TEMPLATE", "load_tokenizer", "make_collator", "train_tokenizer"]

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"


# The generation tags mark what the assistant says, its end token included: that is the target.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}<|{{ message.role }}|>{{ message.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def load_tokenizer(
    section: TokenizerSection, *, model: ModelSection, texts: Iterable[str] = ()
) -> Any:
    """Load or train the tokenizer of a run, and make sure it can end and pad a row.

    Args:
        section: The recipe's `tokenizer`.
        model: The recipe's `model`, whose tokenizer is the default.
        texts: What a trained tokenizer learns from; read only then.

    Returns:
        A transformers tokenizer with `eos_token` and `pad_token`.

    Raises:
        ConfigError: If no tokenizer is named, it has no end-of-text token, or its chat template
            is not to be found.
    """
    if section.train is not None:
        tokenizer = train_tokenizer(texts, vocab_size=section.train.vocab_size)
    else:
        tokenizer = _named_tokenizer(section, model)
    if section.add_tokens:
        known = tokenizer.get_vocab()
        there = [token for token in section.add_tokens if token in known]
        if there:
            raise ConfigError(
                f"tokenizer.add_tokens = {section.add_tokens!r}: {', '.join(there)} is in the "
                "vocabulary already, so it would not be new: leave it out."
            )
        tokenizer.add_tokens(section.add_tokens)
    for name in ("eos_token", "pad_token"):
        word = getattr(section, name)
        if word is not None:
            if word not in tokenizer.get_vocab():
                raise ConfigError(
                    f"tokenizer.{name} = {word!r} is not in the vocabulary: "
                    "list it in tokenizer.add_tokens as well, or use a token the model knows."
                )
            setattr(tokenizer, name, word)
    if tokenizer.eos_token is None and tokenizer.sep_token is None:
        raise ConfigError("the tokenizer has no end-of-text token: set tokenizer.eos_token.")
    if tokenizer.pad_token is None:
        # Padding is masked in attention and in labels, so any token can stand there.
        tokenizer.pad_token = tokenizer.eos_token
    if section.chat_template is not None:
        set_chat_template(tokenizer, section.chat_template)
    return tokenizer


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Any:
    """Train a byte-level BPE: every text can be written in it, and comes back unchanged.

    Digits are tokens of their own, since a small model cannot learn arithmetic on `217` as a word.

    Args:
        texts: Training texts.
        vocab_size: Upper bound on the number of tokens, the special ones included.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, SYSTEM, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    count = 0

    def counted() -> Iterable[str]:
        nonlocal count
        for text in with_progress(texts, what="training the tokenizer"):
            count += 1
            yield text

    bpe.train_from_iterator(counted(), trainer=trainer)
    if count == 0:
        raise DataError(
            "tokenizer.train found no text in data.train: is the source empty? If not, its columns "
            "are not those of data.format: map them with data.columns."
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _named_tokenizer(section: TokenizerSection, model: ModelSection) -> Any:
    from transformers import AutoTokenizer

    name = section.name or model.name
    if name is None:
        raise ConfigError(
            "model.config makes a new model, which has no tokenizer: "
            "set tokenizer.name, or tokenizer.train.vocab_size to train one on the data."
        )
    try:
        return AutoTokenizer.from_pretrained(
            name,
            revision=model.revision if section.name is None else None,
            trust_remote_code=model.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"tokenizer.name = {name!r} cannot be loaded ({why}): check the name, that you are "
            "online or have it cached, and `hf auth login` for gated models."
        ) from error


def make_collator(task: Task, *, tokenizer: Any, model: Any = None) -> Any:
    """A transformers collator: labels of language models are padded with -100, classes are not.

    Args:
        task: The recipe's `model.task`.
        tokenizer: Pads `input_ids`.
        model: Encoder-decoders make their decoder's input from the labels with it.
    """
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    if task == "classification":
        return DataCollatorWithPadding(tokenizer)
    return DataCollatorForSeq2Seq(tokenizer, model=model if task == "seq2seq" else None)
