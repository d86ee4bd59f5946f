"""What answering costs: floating-point operations from the model's shapes and counted, and questions a second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from roma_ray.benchmarks.judged_model import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from roma_ray.benchmarks.requests import RequestAnswers


def flops_per_token(model: PreTrainedModel) -> dict[str, int]:
    """Operations that the weights ask for, a token: {layers, lm_head}, two a weight, of experts those of the top k.

    Attention's products of queries, keys and values come on top: they grow with the length, and for short questions are small.
    `model` may be without weights.
    """
    config = model.config.get_text_config()
    top_k = next((getattr(config, n) for n in ("num_experts_per_tok", "moe_k") if getattr(config, n, None)), 1)
    head = model.get_output_embeddings()
    layers = 0
    for name, parameter in model.base_model.named_parameters():
        if "embed" in name or parameter.dim() < 2:
            continue
        # Experts are stored as one tensor [experts, out, in], of which a token meets the top k.
        used = parameter.numel() if parameter.dim() == 2 else parameter.numel() // parameter.shape[0] * top_k
        layers += 2 * used
    return {"layers": layers, "lm_head": 2 * head.weight.numel()}


def cost_of(subject: Subject, answered: Sequence[RequestAnswers], questions: int) -> dict[str, Any]:
    """Figures of an evaluation: {questions, tokens_per_question, flops_per_token, counted, questions_per_second}.

    `tokens_per_question` are those that were run, shared ones once. `counted` are operations of one batch, by torch's counter:
    {tokens, trunk, base, tuned}; a model's whole is the trunk's and its own. `questions_per_second` {model: figure} counts
    the model's time alone: no loading, no tokenization. Figures that were not measured are absent.
    """
    facts = [answers.facts for answers in answered]
    tokens = sum(f["tokens"] for f in facts)
    seconds = {part: sum(f["model_seconds"].get(part, 0.0) for f in facts) for part in ("trunk", *subject.names)}
    counted: dict[str, Any] = next((f["counted_flops"] for f in facts if f["counted_flops"]), {})
    return {
        "questions": questions,
        "tokens_per_question": tokens / max(questions, 1),
        "flops_per_token": flops_per_token(subject.skeleton()),
        "counted": counted,
        "questions_per_second": {
            name: questions / (seconds["trunk"] + seconds[name])
            for name in subject.names
            # Where the trunk was not run its time is not known.
            if seconds[name] > 0 and not any(f["reused_batches"] for f in facts)
        },
    }
