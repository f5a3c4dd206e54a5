"""`PeftModel`: a Hugging Face model with adapters on it, under PEFT's API."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import absent, checkpoint, given, remainder
from ..core.attach import attach, detach
from ..core.config import Config, PromptConfig
from ..core.layer import AdapterLayer
from ..core.state import CheckpointContext, State, state_of
from ..errors import CheckpointError, ConfigError, NotMergeable, VeneerError, nearest
from ..files.find import check_hub_arguments
from ..targets.quantised import keep_gradients_, warn_of_rounding
from ..terminal import tracked
from ..upstream import checkpointing
from ..upstream.models import note_untied, task_of
from ..upstream.sharding import is_sharded
from ..upstream.trainer import recognise
from ..upstream.versions import remarked
from .adapted import Adapted, _fall_through, _flags_kept_on_error, _state
from .counting import Plan, count, plan
from .guard import Guard
from .schedule import follow
from .status import LayerStatus, ModelStatus, layer_status, model_status


def get_peft_model(
    model: nn.Module,
    peft_config: Config,
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
    revision: str | None = None,
) -> PeftModel:
    """Freeze `model` and put a new adapter on it.

    Args:
        model: any `nn.Module`; prompts need a transformers model. It is changed in place.
        peft_config: which method, where, and its settings.
        adapter_name: what to call the adapter.
        autocast_adapter_dtype: hold the adapter of a half-precision base in fp32, as training needs.
        low_cpu_mem_usage: build the adapter on the meta device, for tensors that are loaded next.

    Raises:
        TargetError: a targeting entry matches nothing.
        VeneerError: the model, or a part of it, already has adapters.
    """
    if revision is not None:
        peft_config = copy.copy(peft_config)
        peft_config.revision = revision
    return PeftModel(
        model,
        peft_config,
        adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )


class PeftModel(nn.Module):
    """A model with adapters. Attributes it does not have are those of the model inside."""

    def __init__(
        self,
        model: nn.Module,
        peft_config: Config,
        adapter_name: str = "default",
        *,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(model, PeftModel) or any(state_of(part) is not None for part in model.modules()):
            raise VeneerError(
                "the model, or a part of it, already has adapters; use add_adapter() to add one, or unload() to "
                "remove them first"
            )
        with _flags_kept_on_error(model):
            model.requires_grad_(False)
            self.base_model = Adapted(model)
            self._attach(adapter_name, peft_config, on_meta=low_cpu_mem_usage, lift=autocast_adapter_dtype)
        self._state.activate((adapter_name,))
        recognise(PeftModel)

    # Access

    @property
    def _state(self) -> State:
        return _state(self.get_base_model())

    @property
    def peft_config(self) -> dict[str, Config]:
        """The configs by adapter name."""
        return self._state.configs

    @property
    def active_peft_config(self) -> Config:
        return self.peft_config[self.active_adapter]

    @property
    def peft_type(self) -> str:
        return self.active_peft_config.peft_type

    @property
    def active_adapters(self) -> list[str]:
        return list(self._state.active)

    @property
    def active_adapter(self) -> str:
        """The first active adapter."""
        if not self._state.active:
            raise VeneerError("no adapter is active; activate one with set_adapter()")
        return self._state.active[0]

    def get_base_model(self) -> nn.Module:
        """The Hugging Face model, with the adapters on it."""
        return self.base_model.model

    def __getattr__(self, name: str) -> Any:
        return _fall_through(self, name, "base_model")

    # Running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        model = self.get_base_model()
        if torch.compiler.is_compiling():
            return model(*args, **kwargs)
        state = state_of(model)
        if state is not None:
            state.is_sharded = is_sharded(self)
        with nullcontext() if state is None else state.lock, remarked():
            return model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`; also takes `adapter_names` and the methods' own facts.

        Calls from several threads run one after another, each with the adapters it names; `set_adapter` is for all.
        """
        state = self._state
        facts = {name: kwargs.pop(name) for name in state.fact_names() if name in kwargs}
        for name in state.live():
            if name in state.configs:
                for member in state.configs[name].members():
                    kwargs.update(member.generate_with)
        with state.lock, state.remembering(facts), remarked():
            return self.get_base_model().generate(*args, **kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """Enable checkpointing; each layer is recomputed with the arguments (adapter names, ...) of its call."""
        settings = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if not settings["use_reentrant"]:
            settings.setdefault("context_fn", CheckpointContext(self._state))
        elif hasattr(self, "enable_input_require_grads"):
            self.enable_input_require_grads()
        checkpointing.enable(self.get_base_model(), settings, **kwargs)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    # Adapters

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: Config,
        *,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add another adapter, of any method; it is trained once `set_adapter` makes it active."""
        self._attach(adapter_name, peft_config, on_meta=low_cpu_mem_usage, lift=autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate one adapter, or several in the order in which they apply.

        Args:
            adapter_name: one name, or several, innermost first.
            inference_mode: activate the adapters without training them.
        """
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        for name in names:
            self._known(name)
        if len(set(names)) < len(names):
            raise VeneerError(f"set_adapter: {names} names an adapter twice")
        merged = self._merged()
        if merged and set(names) != set(self._state.active):
            raise VeneerError(
                f"{', '.join(merged)} is merged into the weights; call unmerge_adapter() before switching"
            )
        if inference_mode:
            self._state.trainable -= set(names)
        self._state.activate(names)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Declare adapters trainable or frozen; a trainable adapter is trained while it is active."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            self._known(name)
            if requires_grad:
                self._state.trainable.add(name)
                keep_gradients_(self.get_base_model())
            else:
                self._state.trainable.discard(name)
            self._state.mark(name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. The last one cannot be removed; use `unload()` to get the bare model."""
        self._known(adapter_name)
        if adapter_name in self._merged():
            raise VeneerError(f"{adapter_name!r} is merged into the weights; call unmerge_adapter() before deleting it")
        if len(self.peft_config) == 1:
            raise VeneerError(f"{adapter_name!r} is the only adapter; use unload() to get the model without it")
        detach(self.get_base_model(), adapter_name, self._state)
        if not self._state.active:
            self._state.activate((next(iter(self.peft_config)),))

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Add the weighted sum of adapters as a new one: `veneer.add_weighted_adapter` on this model."""
        from .combine import add_weighted_adapter

        add_weighted_adapter(self, *args, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Context in which the model computes what the base model does, whether or not adapters are merged."""
        with self._state.lock, self._state.switched(enabled=False):
            yield

    # Merging

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters into the weights, the active ones by default; `unmerge_adapter` is bit-exact.

        Raises:
            NotMergeable: a method cannot be merged, or the merge would change the outputs; nothing is changed.
        """
        self._merge(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Bind the pretrained Parameters back."""
        for layer in self._state.layers.values():
            layer.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Merge the adapters and return the Hugging Face model, without any part of veneer.

        If a merged weight was tied to another module's, the two are untied, and the model's config records it.
        """
        self._merge(adapter_names, safe_merge, progressbar, for_good=True)
        for layer in self._state.layers.values():
            layer.kept = {}
            layer.kept_module = None
        self._state.reshaped.clear()  # the merged weights are in the reshaped layers
        model = self.unload()
        note_untied(model)
        return model

    def unload(self) -> nn.Module:
        """The Hugging Face model without its adapters."""
        state, model = self._state, self.get_base_model()
        for layer in state.layers.values():
            if layer.kept or layer.kept_module is not None:
                layer.unmerge()
            layer.merged_adapters = ()
        for name in list(state.configs):
            detach(model, name, state)
        return model

    def _merge(
        self, adapter_names: Sequence[str] | None, safe_merge: bool, progressbar: bool = False, for_good: bool = False
    ) -> None:
        """Merge in all layers or in none.

        Args:
            for_good: the merge is final, so updates are added in place where possible, after everything that can fail.
        """
        names = self._merge_order(adapter_names)
        layers = list(self._state.layers.values())
        for layer in layers:
            layer.check_merge(names)
        snapshots = [layer.snapshot() for layer in layers]
        in_place = self._summed_in_place(names) if for_good and not safe_merge else []
        summed = {id(layer) for layer in in_place}
        others = [layer for layer in layers if id(layer) not in summed]
        try:
            for layer in tracked([*others, *in_place], "merging", progressbar):
                if id(layer) in summed:
                    layer.merge_in_place(names, safe_merge)
                else:
                    layer.merge(names, safe_merge)
        except BaseException:
            for layer, snapshot in zip(layers, snapshots, strict=True):
                layer.revert(snapshot)
            raise
        warn_of_rounding(layers)

    def _summed_in_place(self, names: Sequence[str]) -> list[AdapterLayer]:
        """The layers whose merge adds to a weight that no other module shares."""
        uses: Counter[int] = Counter()
        for module in self.base_model.model.modules():
            uses.update(id(parameter) for parameter in module._parameters.values() if parameter is not None)
        layers = [layer for layer in self._state.layers.values() if layer.is_summed(names)]
        return [layer for layer in layers if uses[id(layer.base_layer.weight)] == 1]

    def _merge_order(self, adapter_names: Sequence[str] | None) -> tuple[str, ...]:
        """The adapters to merge: inactive ones first, then active ones in the order in which they apply."""
        state = self._state
        for name in adapter_names or ():
            self._known(name)
        names = state.active if adapter_names is None else tuple(adapter_names)
        for name in names:
            if name in state.prompts:
                raise NotMergeable(f"{name!r} is a prompt, which precedes the input and has no form as a weight")
            if not state.adapters(name):
                raise NotMergeable(f"{name!r} adapts no layers, so there is nothing to merge")
        inactive = [name for name in names if name not in state.active]
        active = [name for name in state.active if name in names]
        return (*inactive, *active)

    def _merged(self) -> list[str]:
        """The adapters that are merged in some layer."""
        names: dict[str, None] = {}
        for layer in self._state.layers.values():
            names |= dict.fromkeys(layer.merged_adapters)
        return list(names)

    # Reports

    def parameter_plan(self, adapter_name: str | None = None) -> Plan:
        """The parameters that an adapter adds to each layer: rank, sizes, counts by formula and by tensors, sums."""
        return plan(self._state, self._known(adapter_name or self.active_adapter))

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters."""
        return count(self)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def get_layer_status(self) -> list[LayerStatus]:
        return layer_status(self._state)

    def get_model_status(self) -> ModelStatus:
        return model_status(self._state, self.get_base_model())

    # Files

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | Path | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        **ignored: Any,
    ) -> None:
        """Write each adapter: "default" into the directory, any other into a folder of its name.

        Args:
            selected_adapters: which ones; None: all.
            save_embedding_layers: whether the files also hold the base embeddings; "auto": PEFT's rule.
            is_main_process: false on the processes of a distributed run that must not write.
            path_initial_model_for_weight_conversion: if given, each is written as a plain LoRA on the base as it was,
                as by `veneer.save_as_lora`. PEFT reads the start from that path; here the adapter knows its own.
            state_dict: a state dict of this model with the values to save; None (or empty): the model's own.
            ignored: settings of whole models that callers pass, such as `max_shard_size`; they mean nothing here.
        """
        if not safe_serialization:
            raise CheckpointError("veneer writes safetensors only; pickles can run code when they are loaded")
        from .to_lora import save_as_lora

        directory = Path(save_directory)
        for name in selected_adapters or list(self.peft_config):
            into = directory if self._known(name) == "default" else directory / name
            file = next((p for p in (into, *into.parents) if p.is_file()), None)
            if file is not None:
                raise CheckpointError(f"{str(file)!r} is a file; give a directory to save into")
        whole = None if save_embedding_layers == "auto" else bool(save_embedding_layers)
        for name in selected_adapters or list(self.peft_config):
            config = self.peft_config[name].saved()
            config.inference_mode = True
            into = directory if name == "default" else directory / name
            if path_initial_model_for_weight_conversion is None:
                if state_dict and not is_main_process:
                    continue
                values = given.values(self, self._state, name, state_dict) if state_dict else None
                tensors, notes = checkpoint.collect(self.get_base_model(), self._state, name, whole, values)
                training = {} if values else remainder.collect(self._state, name)
                if is_main_process:
                    remainder.write(into, training)
                    notes |= remainder.note(training)
                    checkpoint.write(into, tensors, notes, config)
            elif is_main_process:
                save_as_lora(into, self, adapter_name=name)

    def push_to_hub(self, repo_id: str, **settings: Any) -> Any:
        """Upload the adapters with a card (`veneer.model.card.push`)."""
        from .card import push

        return push(self, repo_id, **settings)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Config | None = None,
        *,
        autocast_adapter_dtype: bool = True,
        check_base: bool = True,
        allow_pickle: bool = False,
        follow_paths: bool = False,
        allow_absent: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **hub: Any,
    ) -> PeftModel:
        """Put a saved adapter on its base model.

        Args:
            model: the base model the adapter was trained on.
            model_id: a directory, or a hub id.
            is_trainable: go on training it.
            config: use this instead of the file's.
            check_base: refuse a base model other than the adapter's own.
            allow_pickle: where there is no safetensors file, read tensors (and nothing else) from a pickle.
            follow_paths: paths in the file's config (X-LoRA's experts) may lead out of its directory.
            allow_absent: pass over tensors for modules that the model lacks, with a warning that lists them.
            key_mapping: replacements for regular expressions in the file's keys, for modules that have other names now.
            hub: `subfolder`, `revision`, `token`, `cache_dir` and the like.

        Raises:
            CheckpointError: a file is missing, damaged, or does not fit; the model is left as it was.
        """
        check_hub_arguments(hub)
        saved = checkpoint.load(model_id, config, allow_pickle=allow_pickle, follow_paths=follow_paths, **hub)
        saved = saved._replace(tensors=checkpoint.with_other_keys(saved.tensors, key_mapping))
        saved = absent.fitted(model, saved, allow_absent)
        saved.config.inference_mode = not is_trainable
        lift = autocast_adapter_dtype
        with _flags_kept_on_error(model):
            adapted = cls(model, saved.config, adapter_name, autocast_adapter_dtype=lift, low_cpu_mem_usage=True)
            try:
                if allow_absent:
                    saved = absent.without_absent(model, adapted._state, adapter_name, saved)
                checkpoint.fill(model, adapted._state, adapter_name, saved, lift=lift, check_base=check_base)
            except BaseException:
                adapted.unload()
                raise
        return adapted if is_trainable else adapted.eval()

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        *,
        autocast_adapter_dtype: bool = True,
        check_base: bool = True,
        allow_pickle: bool = False,
        follow_paths: bool = False,
        allow_absent: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **hub: Any,
    ) -> None:
        """Load another adapter, or new values into an existing one, whose Parameters stay the same objects."""
        check_hub_arguments(hub)
        is_present = adapter_name in self.peft_config
        follow = follow_paths or is_present  # the paths in a present adapter's config were followed when it was made
        saved = checkpoint.load(model_id, allow_pickle=allow_pickle, follow_paths=follow, **hub)
        saved = saved._replace(tensors=checkpoint.with_other_keys(saved.tensors, key_mapping))
        model = self.get_base_model()
        saved = absent.fitted(model, saved, allow_absent)
        lift = autocast_adapter_dtype
        if is_present:
            checkpoint.check_refill(self._state, adapter_name, saved.config)
            checkpoint.fill(model, self._state, adapter_name, saved, lift=lift, check_base=check_base)
            return
        saved.config.inference_mode = not is_trainable
        self._attach(adapter_name, saved.config, on_meta=True, lift=lift)
        try:
            if allow_absent:
                saved = absent.without_absent(model, self._state, adapter_name, saved)
            checkpoint.fill(model, self._state, adapter_name, saved, lift=lift, check_base=check_base)
        except BaseException:
            detach(model, adapter_name, self._state)
            raise

    # Steps

    def _attach(self, name: str, config: Config, *, on_meta: bool, lift: bool) -> None:
        model = self.get_base_model()
        if not isinstance(config, Config):
            raise ConfigError(f"a veneer config describes an adapter, not a {type(config).__name__}")
        config = copy.copy(config)  # values found for this model must not change the caller's config
        name_or_path = getattr(getattr(model, "config", None), "name_or_path", None)
        config.base_model_name_or_path = name_or_path or config.base_model_name_or_path
        if isinstance(config, PromptConfig) and config.task_type is None:
            config.task_type = task_of(model)
        with remarked():
            state = attach(model, config, name, trainable=not config.inference_mode, on_meta=on_meta, lift=lift)
        if not state.watchers:
            state.watchers.append(Guard(state))
        if not config.inference_mode:
            follow(state, name)

    def _known(self, name: str) -> str:
        if name not in self.peft_config:
            known = ", ".join(self.peft_config)
            raise VeneerError(f"no adapter is called {name!r}; the model has {known}{nearest(name, self.peft_config)}")
        return name
