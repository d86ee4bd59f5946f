"""What the self-check on load costs beside the extraction that it protects: `python -m benchmarks.selfcheck`.

An OLMoE of 0.8 GB (fp32, random weights) is streamed layer by layer: each slice is loaded, checked, and run on packed questions.
CPU seconds, so that other work on the machine does not count.
"""

from __future__ import annotations

import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

from roma_ray.moe.packing import Segment, pack
from roma_ray.moe.passes import run_packed
from roma_ray.moe.selfcheck import check_slice
from roma_ray.moe.slices import load_slice

LAYERS, QUESTIONS, LENGTH = 8, 20, 100
SHAPE = {
    **{"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": LAYERS},
    **{"num_attention_heads": 16, "num_experts": 16, "num_experts_per_tok": 4},
}


def main() -> None:
    """Print seconds of the check and of a question, and the check's share by the number of questions."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_config(OlmoeConfig(**SHAPE))
        size = model.num_parameters() * 4 / 1e9
        model.save_pretrained(folder)
        del model
        packing = pack([Segment(tuple(torch.randint(4096, (LENGTH,)).tolist())) for _ in range(QUESTIONS)])
        check = work = 0.0
        states = None
        for layer in range(LAYERS):
            last = layer == LAYERS - 1
            part = load_slice(
                folder, start=layer, stop=None if last else layer + 1, dtype=torch.float32, with_lm_head=last
            )
            started = time.process_time()
            check_slice(part)
            checked = time.process_time()
            with torch.no_grad():
                states = run_packed(
                    part, packing, states, keep=[LENGTH * n - 1 for n in range(1, QUESTIONS + 1)] if last else None
                ).states
            check, work = check + checked - started, work + time.process_time() - checked
    question = work / QUESTIONS
    print(f"{size:.2f} GB in {LAYERS} slices, one held at a time")
    print(f"{check:.1f} s of checks, {question:.2f} s a question of {LENGTH} tokens")
    for count in (500, 1000, 5000):
        print(f"{count:,} questions: {check / (check + count * question):.2%} of the extraction")


if __name__ == "__main__":
    main()
