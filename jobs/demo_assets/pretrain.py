"""Pretraining of the small OLMoE model: two processes of one thread each, so that a run can be repeated to the bit.

On two cores two one-thread workers are much faster than one two-thread process: the model's matrices are too small to
share. The workers' gradients are summed each step, which for two workers has only one order.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from .corpus import ANSWER, Piece, stream

REPORT_EVERY = 50


@dataclass(frozen=True)
class Recipe:
    """Every setting of a run. `steps` is the run's length; the learning rate falls to zero over its last `decay` part."""

    seed: int = 20260
    vocabulary: int = 2048
    workers: int = 2
    documents: int = 32
    steps: int = 720
    warmup: int = 100
    decay: float = 0.4
    learning_rate: float = 2e-3
    balance: float = 0.01
    micro_tokens: int = 2048
    save_every: int = 200


def model_config(recipe: Recipe) -> OlmoeConfig:
    """A stock OLMoE architecture: 10 layers of 16 experts, 2 of them active (an eighth, as in OLMoE-1B-7B)."""
    return OlmoeConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=128,
        intermediate_size=48,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        initializer_range=0.04,
        router_aux_loss_coef=recipe.balance,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        use_cache=False,
    )


@dataclass
class Batch:
    """Padded rows (B, S) of token ids and of each token's weight as a target; `answers` marks the letters to predict."""

    ids: torch.Tensor
    weights: torch.Tensor
    real: torch.Tensor


def batches(tokenizer: PreTrainedTokenizerFast, documents: list[list[Piece]], micro_tokens: int) -> list[Batch]:
    """Tokenise documents, sort them by length and cut them into batches of about `micro_tokens` padded tokens."""
    flat = tokenizer([text for pieces in documents for text, _ in pieces], add_special_tokens=False)["input_ids"]
    parts = iter(flat)
    rows: list[tuple[list[int], list[float]]] = []
    for pieces in documents:
        ids: list[int] = []
        weights: list[float] = []
        for _, weight in pieces:
            tokens = next(parts)
            ids += tokens
            weights += [weight] * len(tokens)
        rows.append(([*ids, 0], [*weights, 0.05]))
    rows.sort(key=lambda row: len(row[0]))
    out: list[Batch] = []
    while rows:
        count = len(rows)
        while count > 1 and count * len(rows[count - 1][0]) > micro_tokens:
            count -= 1
        width = len(rows[count - 1][0])
        ids_BS = torch.full((count, width), 1)
        weights_BS = torch.zeros(count, width)
        for i, (ids, weights) in enumerate(rows[:count]):
            ids_BS[i, : len(ids)] = torch.tensor(ids)
            weights_BS[i, : len(ids)] = torch.tensor(weights)
        out.append(Batch(ids_BS, weights_BS, weights_BS > 0))
        rows = rows[count:]
    return out


class RouterTape:
    """Keeps the routers' logits of the latest forward, for the load-balancing loss over real tokens only."""

    def __init__(self, model: OlmoeForCausalLM) -> None:
        self.logits: list[torch.Tensor] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(lambda _module, _inputs, output: self.logits.append(output[0]))

    def balance_loss(self, real_T: torch.Tensor, top_k: int) -> torch.Tensor:
        """Mean over layers of E * sum_e load_e * probability_e (Switch Transformer's loss, as in OLMoE)."""
        terms = []
        for logits_TE in self.logits:
            routing_TE = logits_TE[real_T].softmax(-1)
            experts = routing_TE.shape[-1]
            load_E = torch.bincount(routing_TE.topk(top_k).indices.flatten(), minlength=experts) / routing_TE.shape[0]
            terms.append(experts * (load_E * routing_TE.mean(0)).sum() / top_k)
        self.logits = []
        return torch.stack(terms).mean()


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, constant, then linear decay to zero over the last part of the run."""
    left = (recipe.steps - step) / (recipe.decay * recipe.steps)
    return recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup, left)


def _optimizer(model: nn.Module) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.97), fused=True)


def _accumulate(model: OlmoeForCausalLM, tape: RouterTape, batch: Batch, balance: float) -> torch.Tensor:
    """Backward of one batch's weighted loss sum; returns (loss sum, weight, right letters, letters, balance x tokens)."""
    logits_BSV = model(input_ids=batch.ids, use_cache=False).logits[:, :-1]
    targets, weights = batch.ids[:, 1:], batch.weights[:, 1:]
    losses = nn.functional.cross_entropy(logits_BSV.flatten(0, 1), targets.flatten(), reduction="none")
    loss = (losses * weights.flatten()).sum()
    even = tape.balance_loss(batch.real.flatten(), model.config.num_experts_per_tok)
    (loss + balance * even * weights.sum()).backward()
    letters = weights == ANSWER
    right = (logits_BSV.argmax(-1) == targets) & letters
    row = [
        loss.item(),
        weights.sum().item(),
        right.sum().item(),
        letters.sum().item(),
        even.item() * weights.sum().item(),
    ]
    return torch.tensor(row)


def _train_step(
    model: OlmoeForCausalLM,
    tape: RouterTape,
    optimizer: torch.optim.AdamW,
    rows: list[Batch],
    recipe: Recipe,
    step: int,
) -> torch.Tensor:
    """One step over this worker's batches and the others' gradients; returns the sums of `_accumulate` over all."""
    counts = torch.stack([_accumulate(model, tape, batch, recipe.balance) for batch in rows]).sum(0)
    parameters = list(model.parameters())
    flat = torch.cat([*(_grad(p).flatten() for p in parameters), counts])
    if dist.is_initialized():
        dist.all_reduce(flat)
    counts = flat[-5:].clone()
    offset = 0
    for p in parameters:
        p.grad = flat[offset : offset + p.numel()].view_as(p) / counts[1]
        offset += p.numel()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return counts


def _grad(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def new_model(recipe: Recipe) -> OlmoeForCausalLM:
    """A freshly initialised model; the global generator is seeded because the model's own initialisation reads it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = OlmoeForCausalLM(model_config(recipe))
    model.set_experts_implementation("grouped_mm")
    return model


def train_worker(
    rank: int, recipe: Recipe, tokenizer_folder: str, work: str, report: Callable[[str], None] = print
) -> None:
    """Train one worker's share; rank 0 saves `model.pt` and a checkpoint to resume from, and prints progress."""
    torch.set_num_threads(1)
    folder = Path(work).resolve()
    if recipe.workers > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=recipe.workers)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    model = new_model(recipe)
    tape, optimizer = RouterTape(model), _optimizer(model)
    saved, first, seconds = folder / "checkpoint.pt", 0, 0.0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
    start, total = time.monotonic() - seconds, torch.zeros(5)
    for step in range(first, recipe.steps):
        documents = [pieces for _, pieces in stream(recipe.seed, step, rank, recipe.documents)]
        total += _train_step(model, tape, optimizer, batches(tokenizer, documents, recipe.micro_tokens), recipe, step)
        done, seconds = step + 1, time.monotonic() - start
        if rank == 0 and (done % REPORT_EVERY == 0 or done == recipe.steps):
            loss, weight, right, letters, even = total.tolist()
            report(
                f"step {done}/{recipe.steps} loss {loss / weight:.3f} answers right {right / letters:.3f} "
                f"balance {even / weight:.2f} seconds {seconds:.0f}"
            )
            total.zero_()
        if rank == 0 and (done % recipe.save_every == 0 or done == recipe.steps):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done, "seconds": seconds}
            torch.save(state, folder / "checkpoint.tmp")
            os.replace(folder / "checkpoint.tmp", saved)
    if recipe.workers > 1:
        dist.destroy_process_group()


def pretrain(recipe: Recipe, tokenizer_folder: Path, work: Path) -> tuple[OlmoeForCausalLM, float]:
    """Run or resume the whole pretraining in `work`; returns the fp32 model and the seconds spent training.

    Raises ValueError when `work` holds a run with other settings.
    """
    work.mkdir(parents=True, exist_ok=True)
    settings = json.dumps(asdict(recipe), indent=2)
    kept = work / "recipe.json"
    if kept.exists() and kept.read_text() != settings:
        raise ValueError(f"{work} holds a run with other settings: remove it or choose another --work folder")
    kept.write_text(settings)
    (work / "rendezvous").unlink(missing_ok=True)
    arguments = (recipe, str(tokenizer_folder), str(work))
    if recipe.workers > 1:
        torch.multiprocessing.spawn(train_worker, args=arguments, nprocs=recipe.workers)
    else:
        train_worker(0, *arguments)
    state = torch.load(work / "checkpoint.pt", weights_only=True)
    model = new_model(recipe)
    model.load_state_dict(state["model"])
    return model.eval(), float(state["seconds"])
