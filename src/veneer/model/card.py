"""Publishing an adapter: its model card, and the upload to the Hugging Face hub."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.config import CONFIG_NAME, Config
from ..files.gguf.cache import origin_of
from ..files.pull import MODELS, hub_id, name_anywhere
from ..files.write import write_atomically
from ..upstream.auto import AUTO_CLASSES
from .auto import AutoPeftModel

CARD_NAME = "README.md"
PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification"}
USE = """## Use

{where}

```python
from transformers import AutoTokenizer
from veneer import {auto}

model = {auto}.from_pretrained({quoted})
tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
{example}```
"""
USE_ON_OWN_BASE = """## Use

The files do not say where the base model is. Load it as `base`:

```python
from veneer import PeftModel  # or from peft

model = PeftModel.from_pretrained(base, {quoted})
```
"""
CHAT = """messages = [{{"role": "user", "content": {prompt}}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=64, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
CONTINUE = """inputs = tokenizer({prompt}, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(answer[0], skip_special_tokens=True))
"""
CLASSIFY = """scores = model(**tokenizer({prompt}, return_tensors="pt")).logits
print({labels}[scores.argmax().item()])
"""


@dataclass(frozen=True)
class Example:
    """What a card's code asks the model."""

    prompt: str
    labels: tuple[str, ...] = ()
    """The classes in order, for classification."""
    is_chat: bool = False
    """Whether the base model's tokenizer has a chat template, which the training used."""

    def code(self) -> str:
        prompt = json.dumps(self.prompt, ensure_ascii=False)
        if self.labels:
            return CLASSIFY.format(prompt=prompt, labels=json.dumps(self.labels, ensure_ascii=False))
        return (CHAT if self.is_chat else CONTINUE).format(prompt=prompt)


def write_card(
    directory: Path, config: Config, facts: str = "", *, name: str | None = None, example: Example | None = None
) -> None:
    """Write README.md with the metadata that the hub reads and instructions to load the adapter.

    A path of this machine is left out: it means nothing to others.

    Args:
        directory: the adapter's directory.
        config: the adapter's config.
        facts: further Markdown, placed before the instructions.
        name: a repository on the hub, or the path of the directory that the user gave; None: the directory's name.
        example: what the instructions ask the model; None: they only load it.
    """
    from huggingface_hub import ModelCardData

    task = config.task_type or ""
    place = _relative(name or directory.name)
    method = config.peft_type.lower()
    original = hub_id(config.base_model_name_or_path)
    tags = [method, "veneer"]
    if original:
        tags.append(f"base_model:adapter:{original}")
    data = ModelCardData(base_model=original, library_name="peft", pipeline_tag=PIPELINES.get(task), tags=tags)
    title = f"{Path(place).name or 'adapter'}: {method}"
    if config.base_model_name_or_path:
        title += f" on {Path(name_anywhere(config.base_model_name_or_path)).name}"
    usage = _usage(directory, config, place, example)
    text = f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{facts}{usage}"
    write_atomically(directory / CARD_NAME, text.encode())


def _usage(directory: Path, config: Config, place: str, example: Example | None) -> str:
    """The instructions to load the adapter, on the base model that its saved config names."""
    auto_class = AUTO_CLASSES.get(config.task_type or "")
    auto = next((known.__name__ for known in AutoPeftModel.__subclasses__() if known.auto_class == auto_class), None)
    saved = Config.from_pretrained(directory) if (directory / CONFIG_NAME).exists() else config
    base = saved.base_model_name_or_path
    quoted = json.dumps(place, ensure_ascii=False)
    if not base or auto is None:
        return USE_ON_OWN_BASE.format(quoted=quoted)
    where = f"`{place}` is the path of this directory, or its repository on the hub."
    origin = origin_of(base)
    if origin is not None:
        where += f" The base model is the GGUF file `{origin.name}` with the SHA-256 `{origin.sha256}`."
    if base in MODELS:
        where += f" The base model {base} comes from the Python package index (`veneer pull`): the weights of"
        where += f" {MODELS[base].original}, rounded to 4 bits."
    code = example.code() if example else ""
    return USE.format(where=where, auto=auto, quoted=quoted, example=code)


def _relative(name: str) -> str:
    """A path without the directories of this machine."""
    path = Path(name)
    leads_elsewhere = path.is_absolute() or ".." in path.parts or name.startswith("~")
    return path.name if leads_elsewhere else path.as_posix()


def push(saves: Any, repo_id: str, **settings: Any) -> Any:
    """Save a model or a config into a temporary folder, add a card, and upload the folder.

    A base model that is a directory of this machine is not named in what is uploaded.

    Args:
        saves: a model or a config; anything with `save_pretrained`.
        repo_id: the repository to upload to.
        settings: `private`, `token`, `revision`, `create_pr`, `commit_message`, `commit_description`; other
            arguments of transformers' `push_to_hub` are ignored.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_settings = {}
        if "safe_serialization" in settings:
            save_settings["safe_serialization"] = settings["safe_serialization"]
        saves.save_pretrained(folder, **save_settings)
        for file in Path(folder).rglob(CONFIG_NAME):
            forget_paths(file)
        configs = getattr(saves, "peft_config", None)
        if configs and not (Path(folder) / CARD_NAME).exists():
            first_config = next(iter(configs.values()))
            write_card(Path(folder), first_config, name=repo_id)
        return push_folder(folder, repo_id=repo_id, **settings)


def forget_paths(file: Path) -> None:
    """Take the base model out of an adapter_config.json if it is a directory of this machine."""
    content = json.loads(file.read_text(encoding="utf-8"))
    base = content.get("base_model_name_or_path")
    if base and hub_id(base) is None:
        content["base_model_name_or_path"] = None
        write_atomically(file, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def push_folder(
    folder: str | Path,
    *,
    repo_id: str | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    commit_description: str | None = None,
    **ignored: Any,
) -> Any:
    """Upload a saved adapter; the repository is created if it does not exist."""
    from huggingface_hub import create_repo, upload_folder

    url = create_repo(repo_id or Path(folder).name, token=token, private=private, exist_ok=True)
    full_id = getattr(url, "repo_id", repo_id)
    return upload_folder(
        repo_id=str(full_id),
        folder_path=str(folder),
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        token=token,
        create_pr=create_pr,
        revision=revision,
    )
