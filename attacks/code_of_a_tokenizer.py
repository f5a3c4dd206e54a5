"""A prompt's config that would have transformers run code of a repository."""

import json

from _common import CONFIG, adapter, load, refused

home = adapter()
content = {
    "peft_type": "PROMPT_TUNING",
    "num_virtual_tokens": 2,
    "task_type": "CAUSAL_LM",
    "prompt_tuning_init": "TEXT",
}
content |= {"prompt_tuning_init_text": "x", "tokenizer_name_or_path": "attacker/tokenizer"}
(home / CONFIG).write_text(json.dumps(content | {"tokenizer_kwargs": {"trust_remote_code": True}}))
refused(lambda: load(home))
