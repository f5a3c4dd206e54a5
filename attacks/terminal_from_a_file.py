"""Keys and settings that would steer the terminal of whoever inspects or loads the file."""

import subprocess
import sys

import torch
from _common import WEIGHTS, adapter, load, reconfigure
from safetensors.torch import load_file, save_file

home = adapter()
tensors = load_file(home / WEIGHTS)
save_file(tensors | {"\x1b]0;owned\x07": torch.zeros(2), "\x1b[2J": torch.zeros(0)}, home / WEIGHTS)
reconfigure(home, base_model_name_or_path="\x1b[31mred")
shown = ""
for verb in (["inspect", home], ["diff", home, adapter()], ["convert", home, home / "out"]):
    done = subprocess.run([sys.executable, "-m", "veneer", *map(str, verb)], capture_output=True, text=True)
    shown += done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
try:
    load(home)
except ValueError as error:
    shown += str(error)
is_steered = any(c in shown for c in "\x1b\x07")
print(f"terminal_from_a_file {'SUCCEEDED' if is_steered else 'failed: control characters are escaped'}")
sys.exit(is_steered)
