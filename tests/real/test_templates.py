"""The shipped templates against the published tokenizers of their families."""

import pytest
from support.real_parts import TOKENIZERS

from hf_gradacc.data.chat_templates import set_chat_template
from hf_gradacc.recipe.model.ends import find_turn_end

CHAT = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "Four.\n\nIt is even, žluťoučký."},
    {"role": "user", "content": "And 3?"},
    {"role": "assistant", "content": "No."},
]
SYSTEM = {"role": "system", "content": "Be brief."}
NAMES = {
    "qwen3": "chatml",
    "smollm2": "chatml",
    "llama3": "llama3",
    "llama3_1": "llama3",
    "gemma3": "gemma",
    "mistral_nemo": "mistral",
}

ENDS = {
    "qwen3": "<|im_end|>",
    "smollm2": "<|im_end|>",
    "llama3": "<|eot_id|>",  # its EOS is another token, <|end_of_text|>
    "llama3_1": "<|eot_id|>",
    "gemma3": "<end_of_turn>",
    "mistral_nemo": "</s>",
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_template_gives_the_tokens_of_its_family_and_the_same_end(real_tokenizer, name):
    tokenizer = real_tokenizer(name)
    chat = [SYSTEM, *CHAT] if name != "mistral_nemo" else CHAT  # it drops the system turn

    def encode(turns):
        prompt = turns[-1]["role"] == "user"
        encoded = tokenizer.apply_chat_template(
            turns, add_generation_prompt=prompt, return_dict=True
        )
        return encoded["input_ids"]

    def end():
        return tokenizer.convert_ids_to_tokens(find_turn_end(tokenizer))

    assert end() == ENDS[name]
    asked, answered = encode(chat[:-1]), encode(chat)
    text = tokenizer.decode(answered)
    set_chat_template(tokenizer, NAMES[name])
    assert end() == ENDS[name]
    assert encode(chat[:-1]) == asked
    if name == "llama3":  # its first template prompts always
        text = text.removesuffix("<|start_header_id|>assistant<|end_header_id|>\n\n")
    if name == "qwen3":  # it writes an empty thought before the last answer
        text = text.replace("<think>\n\n</think>\n\n", "")
    assert tokenizer.decode(encode(chat)) == text
    assert name in ("llama3", "qwen3") or encode(chat) == answered
