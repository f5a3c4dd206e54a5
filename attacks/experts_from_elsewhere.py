"""An X-LoRA config that names experts outside of its directory: by a path, by a link, on the hub."""

import json

from _common import CONFIG, WEIGHTS, VeneerError, adapter, load, refused
from safetensors.torch import save_file

secret, home = adapter(), adapter()
(home / "link").symlink_to(secret)
save_file({}, home / WEIGHTS)


def use():
    for path in (str(secret), f"../{secret.name}", "link", "attacker/repository"):
        content = {"peft_type": "XLORA", "adapters": {"0": path}, "hidden_size": 32, "task_type": "CAUSAL_LM"}
        (home / CONFIG).write_text(json.dumps(content))
        try:
            load(home)
        except VeneerError as error:
            last = error
            assert "follow_paths" in str(error), error
        else:
            return
    raise last


refused(use)
