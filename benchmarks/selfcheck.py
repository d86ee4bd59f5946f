"""What the self-check on load costs beside the extraction that it protects: `python -m benchmarks.selfcheck`.

An OLMoE of 1 GB (fp32, random weights), or the one of `--model`, is streamed layer by layer: each slice is loaded, checked, and
run on packed questions. CPU seconds, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

from roma_ray.moe.packing import Segment, pack
from roma_ray.moe.passes import run_packed
from roma_ray.moe.selfcheck import check_slice
from roma_ray.moe.slices import load_slice, model_facts

LAYERS, QUESTIONS, LENGTH = 8, 20, 100
SHAPE = {
    **{"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": LAYERS},
    **{"num_attention_heads": 16, "num_experts": 16, "num_experts_per_tok": 4},
}


def main() -> None:
    """Print seconds of the check and of a question, and the check's share by the number of questions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a model folder to measure instead, in its own type")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as made:
        folder = chosen.model or made
        if chosen.model is None:
            AutoModelForCausalLM.from_config(OlmoeConfig(**SHAPE)).save_pretrained(folder)
        facts = model_facts(folder)
        dtype, layers = getattr(torch, facts["dtype"]), facts["num_layers"]
        size = facts["parameters"] * dtype.itemsize / 1e9
        check, work = measure(folder, dtype, layers, facts["vocab_size"])
    print(f"{size:.2f} GB in {layers} slices, {facts['dtype']}, one held at a time")
    question = work / QUESTIONS
    print(f"{check:.1f} s of checks, {question:.2f} s a question of {LENGTH} tokens")
    for count in (500, 1000, 5000):
        print(f"{count:,} questions: {check / (check + count * question):.2%} of the extraction")


def measure(folder: str, dtype: torch.dtype, layers: int, vocabulary: int) -> tuple[float, float]:
    """CPU seconds of all slices' checks, and of the questions."""
    packing = pack([Segment(tuple(torch.randint(vocabulary, (LENGTH,)).tolist())) for _ in range(QUESTIONS)])
    last_tokens = [LENGTH * n - 1 for n in range(1, QUESTIONS + 1)]
    check = work = 0.0
    states = None
    for layer in range(layers):
        last = layer == layers - 1
        part = load_slice(folder, start=layer, stop=None if last else layer + 1, dtype=dtype, with_lm_head=last)
        started = time.process_time()
        check_slice(part)
        checked = time.process_time()
        with torch.no_grad():
            states = run_packed(part, packing, states, keep=last_tokens if last else None).states
        check, work = check + checked - started, work + time.process_time() - checked
        del part
    return check, work


if __name__ == "__main__":
    main()
