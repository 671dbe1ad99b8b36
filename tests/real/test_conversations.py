"""Random conversations of five published tokenizers become the tokens that their families write.

The readings below were written off the templates by hand, one function for each family: what a
model is prompted with, and what it answers. No code of the package renders them.
"""

import json
import random

import pytest

from hf_gradacc.data.chat import split_chat

NUM_CONVERSATIONS = 300
WORDS = [
    "hi",
    "4",
    "naïve",
    "😀👩🏽‍🚀",
    "x = 1\n\n  y",
    "<b>hi</b>",
    "<answer>42</answer>",
    "世界",
    "a  b",
    "$5",
]
WORDS += ["{% raw %}", "don't", "end.", "<", "\tindent", "<|", "assistant\n", "Résumé\n"]


def words(draw, least=1):
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(least, 9))).strip()


def arguments(draw):
    return {"city": words(draw), "days": draw.randint(1, 9), "unit": draw.choice(["C", "F"])}


TOOL = {
    "type": "function",
    "function": {
        "name": "heat",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def talk(draw, *, tools=False, thoughts=False, alternate=True, empty=True):
    """Draw a conversation: a system turn or none, and one to four questions."""
    messages = [{"role": "system", "content": words(draw)}] if draw.random() < 0.4 else []
    for _ in range(draw.randint(1, 4)):
        messages.append({"role": "user", "content": words(draw)})
        if tools and draw.random() < 0.4:
            call = {"name": "heat", "arguments": arguments(draw)}
            number = f"{draw.randrange(10**9):09}"
            turn = {"role": "assistant", "content": ""}
            turn["tool_calls"] = [{"type": "function", "id": number, "function": call}]
            if thoughts and draw.random() < 0.5:
                turn["reasoning_content"] = words(draw)
            result = {"role": "tool", "content": words(draw), "tool_call_id": number}
            messages += [turn, result]
        turn = {"role": "assistant", "content": words(draw, 0 if empty else 1)}
        if thoughts and draw.random() < 0.5:
            turn["reasoning_content"] = words(draw)
        messages.append(turn)
        if not alternate and draw.random() < 0.2:
            messages.append({"role": "assistant", "content": words(draw)})
    return messages


def qwen3(messages, *, tools=None, thinking=None):
    """Qwen3: an empty thought before each answer, earlier thoughts dropped, tools in the system."""

    def render(turns, *, prompt):
        text = ""
        system = turns[0]["content"] if turns[0]["role"] == "system" else None
        if tools:
            listed = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
            text += "<|im_start|>system\n" + (f"{system}\n\n" if system is not None else "")
            text += "# Tools\n\nYou may call one or more functions to assist with the user query."
            text += "\n\nYou are provided with function signatures within <tools></tools> XML tags:"
            text += f"\n<tools>{listed}\n</tools>\n\nFor each function call, return a json object "
            text += "with function name and arguments within <tool_call></tool_call> XML tags:\n"
            text += '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
            text += "</tool_call><|im_end|>\n"
        elif system is not None:
            text += f"<|im_start|>system\n{system}<|im_end|>\n"
        asked = max(i for i, turn in enumerate(turns) if turn["role"] == "user")
        for i, turn in enumerate(turns):
            if turn["role"] == "user":
                text += f"<|im_start|>user\n{turn['content']}<|im_end|>\n"
            elif turn["role"] == "tool":
                text += "<|im_start|>user" if turns[i - 1]["role"] != "tool" else ""
                text += f"\n<tool_response>\n{turn['content']}\n</tool_response>"
                last = i + 1 == len(turns) or turns[i + 1]["role"] != "tool"
                text += "<|im_end|>\n" if last else ""
            elif turn["role"] == "assistant":
                thought, answer = turn.get("reasoning_content") or "", turn["content"]
                text += "<|im_start|>assistant\n"
                if i > asked and (i == len(turns) - 1 or thought):
                    text += f"<think>\n{thought.strip(chr(10))}\n</think>\n\n"
                    answer = answer.lstrip("\n")
                text += answer
                for number, call in enumerate(turn.get("tool_calls", [])):
                    text += "\n" if number or answer else ""
                    said = json.dumps(call["function"]["arguments"], ensure_ascii=False)
                    text += f'<tool_call>\n{{"name": "heat", "arguments": {said}}}\n</tool_call>'
                text += "<|im_end|>\n"
        if prompt:
            text += "<|im_start|>assistant\n"
            text += "<think>\n\n</think>\n\n" if thinking is False else ""
        return text

    return render


def heads(messages, *, tools=None, always=False):
    """Llama 3: a header for each turn, words trimmed; the first release prompts unasked."""

    def render(turns, *, prompt):
        text = "<|begin_of_text|>"
        for turn in turns:
            header = f"<|start_header_id|>{turn['role']}<|end_header_id|>\n\n"
            text += f"{header}{turn['content'].strip()}<|eot_id|>"
        return text + "<|start_header_id|>assistant<|end_header_id|>\n\n" * (prompt or always)

    return render


def gemma3(messages, *, tools=None):
    """Gemma 3: the system turn stands before the first question."""

    def render(turns, *, prompt):
        before, text = "", "<bos>"
        for turn in turns:
            if turn["role"] == "system":
                before = turn["content"] + "\n\n"
                continue
            role = "model" if turn["role"] == "assistant" else "user"
            text += f"<start_of_turn>{role}\n{before}{turn['content'].strip()}<end_of_turn>\n"
            before = ""
        return text + "<start_of_turn>model\n" * prompt

    return render


def mistral(messages, *, tools=None):
    """Mistral Nemo: system turn and tools stand in the last question, once it is the last turn."""

    def render(turns, *, prompt):
        text = "<s>"
        system = turns[0]["content"] if turns[0]["role"] == "system" else None
        asked = max(i for i, turn in enumerate(turns) if turn["role"] == "user")
        for i, turn in enumerate(turns):
            if turn["role"] == "user":
                if tools and turn == turns[asked]:  # as the template compares them
                    inner = {**tools[0]["function"]}
                    listed = ", ".join(
                        f'"{key}": "{value}"'
                        if isinstance(value, str)
                        else f'"{key}": {json.dumps(value, ensure_ascii=False)}'
                        for key, value in inner.items()
                    )
                    text += f'[AVAILABLE_TOOLS][{{"type": "function", "function": {{{listed}}}}}]'
                    text += "[/AVAILABLE_TOOLS]"
                last = i == len(turns) - 1 and system is not None
                text += f"[INST]{f'{system}{chr(10) * 2}' if last else ''}{turn['content']}[/INST]"
            elif turn.get("tool_calls"):
                call = turn["tool_calls"][0]
                said = json.dumps(call["function"], ensure_ascii=False)[:-1]
                text += f'[TOOL_CALLS][{said}, "id": "{call["id"]}"}}]</s>'
            elif turn["role"] == "assistant":
                text += turn["content"] + "</s>"
            elif turn["role"] == "tool":
                text += f'[TOOL_RESULTS]{{"content": {turn["content"]}, '
                text += f'"call_id": "{turn["tool_call_id"]}"}}[/TOOL_RESULTS]'
        return text

    return render


ASKED = "<|im_start|>assistant\n"
FAMILIES = {
    "qwen3": (qwen3, {"tools": True, "thoughts": True, "alternate": False}, "<|im_end|>", [ASKED]),
    "qwen3 without thoughts": (
        qwen3,
        {"tools": True, "alternate": False},
        "<|im_end|>",
        [f"{ASKED}<think>\n\n</think>\n\n"],
    ),
    "llama3": (heads, {"alternate": False}, "<|eot_id|>", []),
    "llama3_1": (heads, {"alternate": False}, "<|eot_id|>", []),
    "gemma3": (gemma3, {}, "<end_of_turn>", []),
    "mistral_nemo": (mistral, {"tools": True}, "</s>", ["[/INST]", "[/TOOL_RESULTS]"]),
}


def conversations(family, name):
    draw = random.Random(name)
    options = family[1]
    for _ in range(NUM_CONVERSATIONS):
        messages = talk(draw, **options)
        called = any("tool_calls" in turn for turn in messages)
        yield messages, [TOOL] if called else None


def options_of(name, tools):
    options = {"tools": tools} if tools else {}
    return options | ({"enable_thinking": False} if name == "qwen3 without thoughts" else {})


def reading_of(name, family, messages, tools):
    extra = {}
    if name == "qwen3 without thoughts":
        extra["thinking"] = False
    if name == "llama3":
        extra["always"] = True
    return family[0](messages, tools=tools, **extra)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_each_turn_is_learned_once_behind_its_prompt_token_by_token(real_tokenizer, name):
    tokenizer, family = real_tokenizer(name.split()[0]), FAMILIES[name]
    num_rows = num_turns = 0
    for messages, tools in conversations(family, name):
        render = reading_of(name, family, messages, tools)
        expected = {}
        for index, turn in enumerate(messages):
            if turn["role"] != "assistant":
                continue
            prompt = render(messages[:index], prompt=True)
            alone = render(messages[: index + 1], prompt=False)
            said = alone.removeprefix(prompt)
            if said == alone:  # the turns before are written otherwise now; the answer is the same
                said = alone[max(alone.rindex(o) + len(o) for o in family[3] if o in alone) :]
            said = said[: said.index(family[2]) + len(family[2])]
            expected[index] = (prompt, said)
        rows = split_chat(tokenizer, messages, options=options_of(name, tools))
        found = []
        for row in rows:
            assert not row.notes["other_prefix"]
            for start, stop in learned_runs(row.labels):
                prefix, answer = row.input_ids[:start], row.input_ids[start:stop]
                found.append((prefix, answer))
                assert row.labels[start:stop] == answer
            num_rows += 1
        wanted = []
        for prompt, said in expected.values():
            ids = tokenizer(prompt + said, add_special_tokens=False)["input_ids"]
            before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            assert ids[: len(before)] == before
            wanted.append((before, ids[len(before) :]))
        assert sorted(found) == sorted(wanted), messages
        num_turns += len(wanted)
    assert num_turns > 2 * NUM_CONVERSATIONS
    assert num_rows <= num_turns


def learned_runs(labels):
    """First and one past the last of each stretch of targets."""
    places = [i for i, label in enumerate(labels) if label != -100]
    starts = [i for i in places if i == 0 or labels[i - 1] == -100]
    stops = [i + 1 for i in places if i + 1 == len(labels) or labels[i + 1] == -100]
    return list(zip(starts, stops, strict=True))
