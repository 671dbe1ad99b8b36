"""A prompt and its completion are the tokens of one text, cut where the prompt ends."""

import pytest
import transformers
from support.bytes_tokenizer import bytes_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hf_gradacc.data.joined import join_and_encode

TEXTS = ["2 + 2 = 4 the answer is 42", "Q: what A: that", "on and on\n\nand on"] * 20


def sentencepiece_like():
    """Puts a space before the first word, as the tokenizers of Llama 2 and Mistral do."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    space = {"replacement": "▁", "prepend_scheme": "first"}
    made.pre_tokenizer = pre_tokenizers.Metaspace(**space, split=True)
    made.decoder = decoders.Metaspace(**space)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def byte_level():
    """Joins a blank to the word behind it, and leaves it out of the word's place."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


MAKERS = [sentencepiece_like, byte_level, bytes_tokenizer]
PAIRS = [("2+2=", "4"), ("Q: what A:", " that"), ("on\n", "and on"), ("", "42"), ("on and", "")]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_both_together_are_the_tokens_of_the_text(make, prompt, completion):
    tokenizer = make()
    ids, labels, straddles = join_and_encode(tokenizer, prompt, completion)
    assert ids == [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(ids[:-1]) == prompt + completion
    learned = tokenizer.decode([label for label in labels[:-1] if label != -100])
    assert learned.strip() == completion.strip()
    assert labels[-1] == tokenizer.eos_token_id
    assert not straddles


@pytest.mark.parametrize(
    ("make", "prompt", "completion", "learned"),
    [
        (byte_level, "Q: what A: ", "that", ""),  # the blank and the word are one token
        (byte_level, "the ans", "wer is 42", " is 42"),
        (sentencepiece_like, "the ans", "wer is 42", " is 42"),
    ],
)
def test_a_token_of_both_belongs_to_the_prompt(make, prompt, completion, learned):
    tokenizer = make()
    ids, labels, straddles = join_and_encode(tokenizer, prompt, completion)
    assert straddles
    assert tokenizer.decode(ids[:-1]) == prompt + completion
    kept = [label for label in labels[:-1] if label != -100]
    assert tokenizer.decode(kept).strip() == learned.strip()


def test_a_tokenizer_that_cannot_place_its_tokens_is_cut_by_their_number():
    tokenizer = byte_level()
    tokenizer.__class__ = type("Slow", (type(tokenizer),), {"is_fast": False})
    for prompt, completion in PAIRS:
        ids, labels, _ = join_and_encode(tokenizer, prompt, completion)
        num_prompt = len(tokenizer(prompt)["input_ids"])
        assert labels == [-100] * num_prompt + ids[num_prompt:]
