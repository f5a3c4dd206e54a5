"""The API reference: every public name of veneer in one of a few pages, with what mkdocstrings says of it."""

from __future__ import annotations

from dataclasses import dataclass

import veneer
from veneer.core.config import all_methods

FOLDER = "reference/api"


@dataclass(frozen=True)
class Group:
    """A page of the reference."""

    title: str
    text: str
    names: tuple[str, ...]


TASKS = (
    "CausalLM",
    "FeatureExtraction",
    "QuestionAnswering",
    "Seq2SeqLM",
    "SequenceClassification",
    "TokenClassification",
)
GROUPS = {
    "models": Group(
        "Models with adapters",
        "Put an adapter on a model, and work with the adapters that are on it.",
        ("veneer.get_peft_model", "veneer.PeftModel", *(f"veneer.PeftModelFor{task}" for task in TASKS)),
    ),
    "loading": Group(
        "Loading and saving",
        "Load a base model and its adapter in one call, read an adapter's config, exchange adapters in a running "
        "model. `PeftModel.from_pretrained` and `save_pretrained` are [methods of the model](models.md).",
        (
            "veneer.AutoPeftModel",
            *(f"veneer.AutoPeftModelFor{task}" for task in TASKS),
            "veneer.pull",
            "veneer.hotswap_adapter",
            "veneer.prepare_model_for_compiled_hotswap",
            "veneer.model.loading.load",
        ),
    ),
    "configs": Group(
        "Configs",
        "A config describes an adapter. Its fields are the keys of `adapter_config.json`. The fields that all configs "
        "share are those of `Config`; each method's own fields, with their defaults, are on the method's page.",
        (),
    ),
    "initialisation": Group(
        "Initialisation",
        "Start an adapter from the base model's weights, from data, or from a text.",
        (
            "veneer.LoftQConfig",
            "veneer.replace_lora_weights_loftq",
            "veneer.quantise_base_",
            "veneer.EvaConfig",
            "veneer.get_eva_state_dict",
            "veneer.initialize_lora_eva_weights",
            "veneer.CordaConfig",
            "veneer.preprocess_corda",
            "veneer.LoraGAConfig",
            "veneer.preprocess_loraga",
            "veneer.initialize_kv_prefix_from_text",
            "veneer.initialize_kv_prefix_from_past_key_values",
            "veneer.prompt_embeddings_from_past_key_values",
        ),
    ),
    "training": Group(
        "Training",
        "Optimizers for an adapter's factors, and what `veneer train` is made of.",
        (
            "veneer.create_loraplus_optimizer",
            "veneer.create_lorafa_optimizer",
            "veneer.create_riemannian_optimizer",
            "veneer.train.run.train",
            "veneer.train.recipe.Recipe",
            "veneer.train.recipe.make",
            "veneer.data.sources.Source",
        ),
    ),
    "inference": Group(
        "Answers and evaluation",
        "What `veneer generate`, `veneer chat` and `veneer eval` are made of.",
        (
            "veneer.parallel",
            "veneer.inference.generation.Sampling",
            "veneer.inference.generation.Writer",
            "veneer.inference.evaluation.read",
            "veneer.inference.evaluation.evaluate",
        ),
    ),
    "merging": Group(
        "Merging and combining",
        "Fold adapters into the base model's weights, and add adapters to each other. "
        "`merge_and_unload` and `merge_adapter` are [methods of the model](models.md).",
        (
            "veneer.add_weighted_adapter",
            "veneer.create_arrow_model",
            "veneer.compose_cartridge_adapters",
            "veneer.merge_report",
            "veneer.reduce_intruder_dimension",
            "veneer.unload_shadow",
            "veneer.merging.merge.merge",
        ),
    ),
    "conversion": Group(
        "Conversion",
        "Turn an adapter of another method into a LoRA, and run programs that import `peft` on veneer.",
        (
            "veneer.convert_to_lora",
            "veneer.save_as_lora",
            "veneer.to_plain_lora_",
            "veneer.install_as_peft",
        ),
    ),
    "errors": Group(
        "Errors",
        "Every error is a `VeneerError`, which is a `ValueError`. Its message says what was asked for, what was found "
        "and what to do.",
        (
            "veneer.VeneerError",
            "veneer.ConfigError",
            "veneer.TargetError",
            "veneer.CheckpointError",
            "veneer.BaseMismatch",
            "veneer.NotMergeable",
            "veneer.errors.DataError",
            "veneer.errors.TrainingError",
            "veneer.RoundingWarning",
        ),
    ),
}
"""The pages by their file names."""

BASICS = ("veneer.Config", "veneer.PeftConfig", "veneer.TaskType", "veneer.METHODS", "veneer.all_methods")
"""Public names about all configs, on the page of configs."""

WITHOUT_FIELDS = "    options:\n      members: false\n      show_signature: false"


def generated() -> dict[str, str]:
    """The Markdown of each page by its path in docs/."""
    check_names()
    result = {_path(name): markdown(group) for name, group in GROUPS.items()}
    result[_path("configs")] = configs(GROUPS["configs"])
    result[_path("index")] = index()
    return result


def check_names() -> None:
    """Raise ValueError if a public name is on no page."""
    missing = set(veneer.__all__) - {name.removeprefix("veneer.") for name in documented()} - {"__version__"}
    if missing:
        raise ValueError(f"docs/pages/api.py: public names that belong to no group: {sorted(missing)}")


def documented() -> list[str]:
    """The full name of everything in the reference."""
    result = [*BASICS, *config_names()]
    for group in GROUPS.values():
        result += group.names
    return result


def config_names() -> list[str]:
    """Every config among the public names, apart from those of initialisers."""
    elsewhere = {name for group in GROUPS.values() for name in group.names}
    names = [f"veneer.{name}" for name in sorted(veneer.__all__, key=str.lower) if name.endswith("Config")]
    return [name for name in names if name not in elsewhere and name not in BASICS]


def index() -> str:
    """A table of all names, by page."""
    parts = [
        "# API reference",
        "The public names of `veneer`, and those of its modules that the [guides](../../guides/fine-tune.md) use. "
        "Names that PEFT has too take the same arguments.",
    ]
    for name, group in GROUPS.items():
        names = (*BASICS, *config_names()) if name == "configs" else group.names
        links = ", ".join(f"[`{full.rpartition('.')[2]}`]({name}.md#{full})" for full in names)
        parts.append(f"## [{group.title}]({name}.md)\n\n{group.text}\n\n{links}")
    return "\n\n".join(parts) + "\n"


def markdown(group: Group) -> str:
    """A page with each of the group's names."""
    parts = [f"# {group.title}", group.text, *(f"::: {name}" for name in group.names)]
    return "\n\n".join(parts) + "\n"


def configs(group: Group) -> str:
    """The page of configs: what all share in full, then each with a link to its fields."""
    methods = {f"veneer.{config.__name__}": name for name, config in all_methods().items()}
    parts = [f"# {group.title}", group.text]
    for name in (*BASICS, *config_names()):
        if name in methods:
            method = methods[name]
            parts.append(f"::: {name}\n{WITHOUT_FIELDS}")
            parts.append(f"Fields: [{method}](../../methods/{method}.md#settings)")
        elif name == "veneer.PeftConfig":
            parts.append(f"::: {name}\n{WITHOUT_FIELDS}")
            parts.append("PEFT's name of [`Config`](#veneer.Config).")
        else:
            parts.append(f"::: {name}")
    return "\n\n".join(parts) + "\n"


def _path(name: str) -> str:
    return f"{FOLDER}/{name}.md"
