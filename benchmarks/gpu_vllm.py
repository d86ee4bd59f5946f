"""vLLM's prefill rate on given prompts: `gpu_vllm.py CONFIG_FOLDER PROMPTS.json apart|shared`, the process that `gpu.py --vllm` starts.

Random weights of the same shape, one new token a question; with or without its own sharing of prefixes. Prints JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def rate(folder: str, prompts: list[list[int]], *, shared: bool) -> float:
    """Prompt tokens a second of the second of two calls, the first of which warms up."""
    from vllm import LLM, SamplingParams

    model: Any = LLM(
        model=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=512,
        gpu_memory_utilization=0.85,
        enable_prefix_caching=shared,
    )
    asked = [{"prompt_token_ids": ids} for ids in prompts]
    one = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    model.generate(asked, one, use_tqdm=False)
    if shared:
        # Else the second call finds every prompt whole.
        model.reset_prefix_cache()
    started = time.perf_counter()
    model.generate(asked, one, use_tqdm=False)
    return sum(map(len, prompts)) / (time.perf_counter() - started)


def main() -> None:
    """Print one of the two rates, each in a process of its own: vLLM does not give the device's memory back."""
    folder, prompts, shared = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), sys.argv[3] == "shared"
    print(json.dumps({"tokens_per_second": rate(folder, prompts, shared=shared)}))


if __name__ == "__main__":
    main()
