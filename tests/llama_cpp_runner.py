"""Runs GGUF files in llama.cpp, for `test_llama_cpp.py`. It runs in `.venv-gguf`, which has llama-cpp-python only.

    python llama_cpp_runner.py JOB.json RESULT.npz

The job names a model, perhaps an adapter, texts to tokenize, and lists of ids. For each list, the result has the logits
of each position (`logits0`, ...) and the ids that greedy generation adds (`greedy0`, ...). The functions of the C
interface are called directly: the class `Llama` of some releases ignores its `lora_path`.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

LONGEST = 512


class Session:
    """A model in llama.cpp, perhaps with an adapter, that computes one sequence."""

    def __init__(self, model: str, adapter: str | None) -> None:
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), settings)
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {model}")
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.size = llama_cpp.llama_vocab_n_tokens(self.vocabulary)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = LONGEST
        parameters.n_batch = LONGEST
        parameters.n_ubatch = LONGEST
        parameters.n_threads = parameters.n_threads_batch = 1  # several wait for each other by spinning
        parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        if adapter is not None:
            self.adapt(adapter)

    def adapt(self, path: str) -> None:
        adapter = llama_cpp.llama_adapter_lora_init(self.model, path.encode())
        if not adapter:
            raise SystemExit(f"llama.cpp does not load the adapter {path}")
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        status = llama_cpp.llama_set_adapters_lora(self.context, adapters, 1, (ctypes.c_float * 1)(1.0))
        assert status == 0, status

    def tokenized(self, text: str) -> list[int]:
        """The ids of a text, with those that the model adds, and with special tokens by their text."""
        content = text.encode()
        ids = (llama_cpp.llama_token * LONGEST)()
        count = llama_cpp.llama_tokenize(self.vocabulary, content, len(content), ids, LONGEST, True, True)
        assert count >= 0, (text, count)
        return list(ids[:count])

    def logits(self, ids: list[int]) -> np.ndarray:
        """The logits of each of these positions, which follow those of the calls before; (length, vocabulary)."""
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i] = token
            batch.pos[i] = self.length + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = 1
        assert llama_cpp.llama_decode(self.context, batch) == 0
        pointer = llama_cpp.llama_get_logits(self.context)
        values = np.ctypeslib.as_array(pointer, (len(ids) * self.size,)).copy()
        llama_cpp.llama_batch_free(batch)
        self.length += len(ids)
        return values.reshape(len(ids), self.size)

    def restart(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self.length = 0


def run(job: dict[str, Any]) -> dict[str, np.ndarray]:
    session = Session(job["model"], job.get("adapter"))
    result: dict[str, np.ndarray] = {}
    for i, text in enumerate(job.get("texts", ())):
        result[f"tokens{i}"] = np.array(session.tokenized(text), dtype=np.int64)
    for i, ids in enumerate(job.get("ids", ())):
        session.restart()
        logits = session.logits(ids)
        result[f"logits{i}"] = logits
        added: list[int] = []
        while len(added) < job.get("new", 0):
            added.append(int(logits[-1].argmax()))
            logits = session.logits(added[-1:])
        result[f"greedy{i}"] = np.array(added, dtype=np.int64)
    return result


@llama_cpp.llama_log_callback
def log(level: int, text: bytes, data: Any) -> None:
    if level == 4:  # an error
        sys.stderr.write(text.decode(errors="replace"))


if __name__ == "__main__":
    llama_cpp.llama_log_set(log, None)
    llama_cpp.llama_backend_init()
    job_path, result_path = sys.argv[1:]
    np.savez(result_path, **run(json.loads(Path(job_path).read_text(encoding="utf-8"))))
