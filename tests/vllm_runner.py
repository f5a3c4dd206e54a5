"""Runs adapters in vLLM, for `test_vllm.py`. It runs in `.venv-vllm`, which has vLLM and not veneer.

    python vllm_runner.py JOB.json RESULT.json

The job names a model, a prompt as token ids, and adapters by name. For each adapter, and for the name "base", the
result has the log-probabilities of the prompt's tokens after the first and the ids that greedy generation adds, or the
error with which vLLM refuses the adapter.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

ADDED = 8


def answered(llm: Any, prompt: list[int], adapter: Any) -> dict[str, Any]:
    """What the model with an adapter says of the prompt."""
    sampling = SamplingParams(temperature=0, max_tokens=ADDED, ignore_eos=True, prompt_logprobs=0, detokenize=False)
    (result,) = llm.generate([{"prompt_token_ids": prompt}], sampling, lora_request=adapter, use_tqdm=False)
    scores = [result.prompt_logprobs[i][token].logprob for i, token in enumerate(prompt) if i]
    return {"scores": scores, "added": list(result.outputs[0].token_ids)}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(
        job["model"],
        skip_tokenizer_init=True,
        dtype="float32",
        enable_lora=True,
        max_lora_rank=job["rank"],
        max_model_len=64,
        max_num_seqs=2,
        enforce_eager=True,
    )
    results = {"base": answered(llm, job["prompt"], None)}
    for number, (name, path) in enumerate(job["adapters"].items(), start=1):
        request = LoRARequest(name, number, path)
        try:
            llm.llm_engine.add_lora(request)
        except Exception as error:  # of any kind that vLLM has
            results[name] = {"refused": f"{type(error).__name__}: {error}"}
            continue
        results[name] = answered(llm, job["prompt"], request)
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
