"""What the attacks share: a victim that loads an adapter, and the verdict."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

warnings.simplefilter("ignore")

import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from veneer import LoraConfig, PeftModel, VeneerError, get_peft_model  # noqa: E402

WEIGHTS, CONFIG, PICKLE = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=67)


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def adapter(**settings) -> Path:
    """The directory of an honest adapter, to be tampered with."""
    home = Path(tempfile.mkdtemp(prefix="veneer-attack-"))
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"]} | settings)
    get_peft_model(base(), config).save_pretrained(home)
    return home


def reconfigure(home: Path, **fields) -> None:
    content = json.loads((home / CONFIG).read_text())
    (home / CONFIG).write_text(json.dumps(content | fields))


def load(home: Path, **how) -> PeftModel:
    return PeftModel.from_pretrained(base(), home, **how)


def limit_memory(more: int = 1 << 31) -> None:
    """So that a success does not take the machine with it."""
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + more, resource.RLIM_INFINITY))


def refused(use: Callable[[], object], harm: Callable[[], bool] = lambda: False, seconds: float = 30) -> None:
    """The attack failed if `use` ends in a veneer error in time, and no harm was done; ends the script."""
    start = time.monotonic()
    try:
        use()
        verdict = "SUCCEEDED: nothing was refused"
    except VeneerError as error:
        verdict = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    except BaseException as error:  # noqa: BLE001
        verdict = f"SUCCEEDED: {type(error).__name__}: {error}"
    if harm():
        verdict = "SUCCEEDED: harm was done"
    if time.monotonic() - start > seconds:
        verdict = f"SUCCEEDED: it took {time.monotonic() - start:.0f} s"
    print(f"{Path(sys.argv[0]).stem} {verdict}")
    sys.exit(verdict.startswith("SUCCEEDED"))
