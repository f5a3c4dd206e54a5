"""What happens around training: import, attach, load, switch, save, merge, in veneer and in PEFT.

    python -m bench.start

SmolLM2-135M, LoRA of rank 16 on all 210 linear layers; attaching is measured on a 7B-shaped Llama without memory.
Results go to docs/performance-start.json, the table beside it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import veneer

from .common import load_base
from .pairs import DOCS, Pair, alternate, timed, write

SETTINGS = dict(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def import_seconds(line: str) -> float:
    """What an import takes after that of torch, in a process of its own."""
    script = f"import torch, time; start = time.perf_counter(); {line}; print(time.perf_counter() - start)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def imports(times: int) -> Pair:
    ours, theirs = "from veneer import LoraConfig, get_peft_model", "from peft import LoraConfig, get_peft_model"
    pair = Pair("import, beyond torch's", "veneer", "peft")
    return alternate(pair, lambda: import_seconds(ours), lambda: import_seconds(theirs), times)


def attach(times: int) -> Pair:
    """A Llama of 32 layers of width 4096 on meta, 7 linear targets a layer."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    def run(library: Any) -> float:
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig())
            config = library.LoraConfig(**SETTINGS | {"target_modules": LINEARS})
            return timed(lambda: library.get_peft_model(model, config))

    return alternate(Pair("attach LoRA, 7B on meta", "veneer", "peft", 0.35), *_both(run, veneer, peft), times)


def switching(times: int) -> list[Pair]:
    """Load, switch and save among ten adapters."""
    import peft

    folder = Path(tempfile.mkdtemp())
    models = {}
    for library in (veneer, peft):
        model = library.get_peft_model(load_base()[0], library.LoraConfig(**SETTINGS))
        model.save_pretrained(folder / library.__name__)
        models[library] = model
    counts = dict.fromkeys(models, 0)

    def load(library: Any) -> float:
        counts[library] += 1
        return timed(lambda: models[library].load_adapter(folder / library.__name__, f"a{counts[library]}"))

    def switch(library: Any) -> float:
        counts[library] += 1
        name = "a1" if models[library].active_adapter == "default" else "default"
        return timed(lambda: models[library].set_adapter(name))

    def save(library: Any) -> float:
        return timed(lambda: models[library].save_pretrained(folder / "saved", selected_adapters=["a3"]))

    return [
        alternate(Pair("load a further adapter", "veneer", "peft", 0.08), *_both(load, veneer, peft), 8),
        alternate(Pair("set_adapter, of ten", "veneer", "peft", 0.02), *_both(switch, veneer, peft), times),
        alternate(Pair("save one of ten", "veneer", "peft", 0.2), *_both(save, veneer, peft), times),
    ]


def merge(times: int) -> Pair:
    import peft

    def run(library: Any) -> float:
        model = library.get_peft_model(load_base()[0], library.LoraConfig(**SETTINGS, init_lora_weights=False))
        return timed(model.merge_and_unload)

    return alternate(Pair("merge_and_unload", "veneer", "peft", 0.35), *_both(run, veneer, peft), times)


def _both(run: Any, *libraries: Any) -> list[Any]:
    return [lambda library=library: run(library) for library in libraries]


def main(out: Annotated[Path, typer.Option(help="Where the table goes.")] = DOCS, times: int = 5) -> None:
    write("start", [attach(times), *switching(times), merge(times), imports(times)], out)


if __name__ == "__main__":
    typer.run(main)
