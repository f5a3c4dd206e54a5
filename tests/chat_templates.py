"""The structures of stock chat templates, each with what its assistant writes: the words and what ends the turn.

Each is the template's shape in a few lines, not its text. `learned(turn, last)` is what must be learned of a turn, bytes
and all; `turn` is the message, `last` whether it ends the conversation.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Stock:
    name: str
    template: str
    special: tuple[str, ...]
    learned: Callable[[dict, bool], str]
    eos: str
    bos: str | None = None
    system: bool = True
    tools: bool = False

    def __str__(self) -> str:
        return self.name


def ends(stop: str, before: str = "") -> Callable[[dict, bool], str]:
    return lambda turn, last: before + turn["content"] + stop


LOOP = "{% for m in messages %}"
END = "{% endfor %}"
CHATML = (
    LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n" + END
    + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
CALL = "<tool_call>\n{{ c.function | tojson }}\n</tool_call>"
CALLS = "{% for c in m.tool_calls %}{% if m.content or not loop.first %}\n{% endif %}" + CALL + END
ALTERNATE = (
    "{% for m in messages if m.role != 'system' %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% endfor %}"
)
QWEN = (
    "{% if tools %}<|im_start|>system\n# Tools\n{{ tools | tojson }}<|im_end|>\n"
    "{% elif messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}" + LOOP
    + "{% if m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\nTHINK{{ m.content or '' }}{% if m.tool_calls %}" + CALLS + "{% endif %}<|im_end|>\n"
    "{% endif %}" + END + "{% if add_generation_prompt %}<|im_start|>assistant\nBEGIN{% endif %}"
)  # fmt: skip
LAST_QUERY = (
    "{% set ns = namespace(q=0) %}" + LOOP + "{% if m.role == 'user' %}{% set ns.q = loop.index0 %}{% endif %}" + END
)
THOUGHT = (
    "{% if m.role == 'assistant' and loop.index0 > ns.q and (loop.last or m.reasoning_content) %}"
    "<think>\n{{ (m.reasoning_content or '') | trim }}\n</think>\n\n{% endif %}"
)
QWEN3 = LAST_QUERY + QWEN.replace("THINK", THOUGHT).replace("BEGIN", "")
QWEN3_THINKING = LAST_QUERY + QWEN.replace("THINK", THOUGHT).replace("BEGIN", "<think>\n")


def qwen_calls(turn: dict) -> str:
    calls = [f"<tool_call>\n{json.dumps(c['function'])}\n</tool_call>" for c in turn.get("tool_calls", ())]
    return "\n".join(([turn["content"]] if turn.get("content") else []) + calls) + "<|im_end|>"


def qwen3(opened: bool) -> Callable[[dict, bool], str]:
    """A turn after the last question thinks, at the end of the conversation at least with nothing."""

    def learned(turn: dict, last: bool) -> str:
        thought = turn.get("reasoning_content", "")
        begin = "" if opened else "<think>\n"
        return (f"{begin}{thought}\n</think>\n\n" if last or (thought and turn.get("tool_calls")) else "") + qwen_calls(
            turn
        )

    return learned


GPT_OSS = (
    "<|start|>system<|message|>You are ChatGPT.<|end|>"
    + LOOP
    + "{% if m.role == 'system' %}<|start|>developer<|message|># Instructions\n\n{{ m.content }}<|end|>"
    "{% elif m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>"
    "{% elif m.role == 'tool' %}<|start|>functions.look to=assistant<|channel|>commentary<|message|>{{ m.content }}<|end|>"
    "{% elif m.tool_calls %}<|start|>assistant<|channel|>commentary to=functions.{{ m.tool_calls[0].function.name }} "
    "<|constrain|>json<|message|>{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% elif loop.last and not add_generation_prompt %}"
    "<|start|>assistant{% if m.reasoning_content %}<|channel|>analysis<|message|>{{ m.reasoning_content }}<|end|>"
    "<|start|>assistant{% endif %}<|channel|>final<|message|>{{ m.content }}<|return|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}"
    + END
    + "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def gpt_oss(turn: dict, last: bool) -> str:
    if turn.get("tool_calls"):
        function = turn["tool_calls"][0]["function"]
        arguments = json.dumps(function["arguments"])
        return f"<|channel|>commentary to=functions.{function['name']} <|constrain|>json<|message|>{arguments}<|call|>"
    thought = turn.get("reasoning_content")
    before = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought and last else ""
    return f"{before}<|channel|>final<|message|>{turn['content']}{'<|return|>' if last else '<|end|>'}"


MISTRAL_3 = (
    "{% set ns = namespace(q=0) %}{{ bos_token }}" + LOOP
    + "{% if m.role == 'user' %}{% set ns.q = loop.index0 %}{% endif %}" + END + LOOP
    + "{% if m.role == 'user' %}{% if tools and loop.index0 == ns.q %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]"
    "{% endif %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}{% if not messages[loop.index0 - 1].tool_calls %}{{ raise_exception('Not the same number of "
    "function calls and responses') }}{% endif %}[TOOL_RESULTS] {{ m.content | tojson }}[/TOOL_RESULTS]"
    "{% elif m.tool_calls %}[TOOL_CALLS] {{ m.tool_calls | tojson }}{{ eos_token }}"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}{% endif %}" + END
)  # fmt: skip


def mistral_3(turn: dict, last: bool) -> str:
    if turn.get("tool_calls"):
        return f"[TOOL_CALLS] {json.dumps(turn['tool_calls'])}</s>"
    return f" {turn['content']}</s>"


def plain_roles(user: str, assistant: str, after: str = "") -> str:
    """Roles as words, for all messages; a system message stands bare."""
    return (
        LOOP
        + "{% if m.role == 'system' %}{{ m.content }}\n\n"
        + f"{{% elif m.role == 'user' %}}{user}{{% else %}}{assistant}{{{{ m.content }}}}{after}{{% endif %}}"
        + END
        + f"{{% if add_generation_prompt %}}{assistant.rstrip(' ')}{{% endif %}}"
    )


LLAMA_3 = (
    "{{ bos_token }}" + LOOP + "<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>"
    + END + "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)  # fmt: skip


def llama_3(turn: dict, last: bool) -> str:
    if turn.get("tool_calls"):
        return json.dumps(turn["tool_calls"][0]["function"]) + "<|eot_id|>"
    return turn["content"] + "<|eot_id|>"


R1 = (
    "{{ bos_token }}" + LOOP + "{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% else %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}" + END
    + "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)  # fmt: skip

TEMPLATES = [
    Stock("chatml", CHATML, ("<|im_start|>", "<|im_end|>"), ends("<|im_end|>"), "<|im_end|>"),
    Stock("base-with-chatml", CHATML, ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), ends("<|im_end|>"), "<|endoftext|>"),
    Stock(
        "internlm2", "{{ bos_token }}" + CHATML, ("<s>", "<|im_start|>", "<|im_end|>", "</s>"), ends("<|im_end|>"), "</s>",
        bos="<s>",
    ),
    Stock(
        "llama-3", LLAMA_3, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), llama_3,
        "<|eot_id|>", bos="<|begin_of_text|>", tools=True,
    ),
    Stock(
        "llama-2",
        LOOP + "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}{% endif %}" + END,
        ("<s>", "</s>"), ends(" </s>", " "), "</s>", bos="<s>", system=False,
    ),
    Stock(
        "mistral-1",
        ALTERNATE + "{{ bos_token }}" + LOOP + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}" + END,
        ("<s>", "</s>"), ends("</s>"), "</s>", bos="<s>", system=False,
    ),
    Stock(
        "mistral-3", MISTRAL_3,
        ("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        mistral_3, "</s>", bos="<s>", system=False, tools=True,
    ),
    Stock(
        "mistral-7",
        "{{ bos_token }}" + LOOP + "{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
        "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}" + END,
        ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), ends("</s>"), "</s>", bos="<s>",
    ),
    Stock(
        "gemma-3",
        ALTERNATE + "{{ bos_token }}" + LOOP + "{% if m.role != 'system' %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{% if loop.index0 == 1 and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
        "{{ m.content | trim }}<end_of_turn>\n{% endif %}" + END
        + "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), ends("<end_of_turn>"), "<eos>", bos="<bos>",
    ),
    Stock(
        "qwen-2.5", QWEN.replace("THINK", "").replace("BEGIN", ""), ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        lambda turn, last: qwen_calls(turn), "<|im_end|>", tools=True,
    ),
    Stock("qwen-3", QWEN3, ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), qwen3(False), "<|im_end|>", tools=True),
    Stock("qwen-3-thinking", QWEN3_THINKING, ("<|im_start|>", "<|im_end|>"), qwen3(True), "<|im_end|>"),
    Stock(
        "phi-3",
        LOOP + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n" + END
        + "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"), ends("<|end|>"), "<|endoftext|>",
    ),
    Stock(
        "phi-4",
        LOOP + "<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>" + END
        + "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
        ("<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|endoftext|>"), ends("<|im_end|>"), "<|endoftext|>",
    ),
    Stock(
        "gpt-oss", GPT_OSS,
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"),
        gpt_oss, "<|return|>", tools=True,
    ),
    Stock(
        "deepseek-r1", R1, ("<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        ends("<｜end▁of▁sentence｜>"), "<｜end▁of▁sentence｜>", bos="<｜begin▁of▁sentence｜>",
    ),
    Stock(
        "deepseek-2",
        "{{ bos_token }}" + plain_roles("User: {{ m.content }}\n\n", "Assistant: ", "{{ eos_token }}"),
        ("<bos>", "<eos>"), ends("<eos>", " "), "<eos>", bos="<bos>",
    ),
    Stock(
        "zephyr",
        LOOP + "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n" + END + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ("<s>", "</s>"), ends("</s>"), "</s>", bos="<s>",
    ),
    Stock(
        "vicuna", plain_roles("USER: {{ m.content }} ", "ASSISTANT: ", "</s>"), ("<s>", "</s>"), ends("</s>", " "), "</s>",
        bos="<s>",
    ),
    Stock(
        "command-r",
        "{{ bos_token }}" + LOOP + "<|START_OF_TURN_TOKEN|>{% if m.role == 'user' %}<|USER_TOKEN|>{% elif m.role == 'system' %}"
        "<|SYSTEM_TOKEN|>{% else %}<|CHATBOT_TOKEN|>{% endif %}{{ m.content }}<|END_OF_TURN_TOKEN|>" + END
        + "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
        ("<BOS>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        ends("<|END_OF_TURN_TOKEN|>"), "<|END_OF_TURN_TOKEN|>", bos="<BOS>",
    ),
    Stock(
        "glm-4", "[gMASK]<sop>" + LOOP + "<|{{ m.role }}|>\n{{ m.content }}" + END + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"),
        lambda turn, last: turn["content"] + ("<|endoftext|>" if last else "<|user|>"), "<|endoftext|>",
    ),
    Stock(
        "olmo-2",
        "{{ bos_token }}" + LOOP + "<|{{ m.role }}|>\n{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% if not loop.last %}\n{% endif %}" + END + "{% if add_generation_prompt %}\n<|assistant|>\n{% endif %}",
        ("<|endoftext|>",), ends("<|endoftext|>"), "<|endoftext|>", bos="<|endoftext|>",
    ),
    Stock(
        "granite-3",
        LOOP + "<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n" + END
        + "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}",
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"), ends("<|end_of_text|>"), "<|end_of_text|>",
    ),
    Stock(
        "alpaca", plain_roles("### Instruction:\n{{ m.content }}\n\n", "### Response:\n", "\n\n"), ("<eos>",),
        lambda turn, last: turn["content"] + ("<eos>" if last else ""), "<eos>",
    ),
]  # fmt: skip
