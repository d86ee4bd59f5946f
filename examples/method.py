"""Routing Manifold Alignment in one sitting: the whole method on the embedded model, in one process and one file.

    python examples/method.py            # under a minute on a laptop, nothing to download

It calls the functions that `roma-ray run` calls. What it leaves out is what makes a run resumable, distributed and
judged: stages, caches on disk, workers, checkpoints, statistics. Equations are those of the RoMA paper
(https://arxiv.org/abs/2511.07419). `docs/glossary.md` explains cut, trunk, head and S.
"""

import torch

from roma_ray.assets import assets_path
from roma_ray.config.schema import PromptConfig, QuestionSource
from roma_ray.engine.batches import chunks, epoch_order, plan_batches
from roma_ray.engine.extractor import Reading, run_part
from roma_ray.engine.forward import choice_scores, lay_out, mean_routing, own_tokens, predict, task_losses
from roma_ray.manifold.losses import manifold_loss, neighbor_targets
from roma_ray.manifold.neighbors import find_neighbors, successful_set
from roma_ray.moe.masters import RouterMasters
from roma_ray.moe.passes import run_packed
from roma_ray.moe.reading import read_routing
from roma_ray.moe.slices import load_slice
from roma_ray.questions.prompts import PromptBuilder, build_prompts
from roma_ray.questions.readers import read_questions
from roma_ray.questions.splits import assign_splits
from roma_ray.stages.embedding import encode, load_encoder

QUESTIONS, TUNED_LAYERS, TOKENS, RULE = 900, 5, "Last1", "raw"
EPOCHS, BATCH, LEARNING_RATE, STRENGTH = 2, 32, 5e-3, 0.8
torch.manual_seed(0)
torch.set_num_threads(2)

# --- Questions: read, split into train, validation and test by a seed, written as prompts of the model's tokens.
from transformers import AutoTokenizer  # noqa: E402 - after the settings, so that they are read first

MODEL = assets_path() / "model"
sources = [QuestionSource(path=f"assets:questions/{part}.jsonl", limit=QUESTIONS // 2) for part in ("train", "test")]
questions, _ = read_questions(sources)
questions = assign_splits(questions, validation_fraction=0.1, test_fraction=0.2, seed=0)
builder = PromptBuilder(AutoTokenizer.from_pretrained(MODEL), PromptConfig(format="cloze", max_tokens=64))
prompts, _ = build_prompts(questions, builder)
by_id = {question.id: question for question in questions}
train, test = ([n for n, p in enumerate(prompts) if p.split == split] for split in ("train", "test"))

# --- Extract. Only the routers of the last layers train, so the layers below them, the trunk, are a constant function of
# the prompt: they run once. The cut is the first tuned layer; its states after the attention are what the head starts from.
model = load_slice(str(MODEL), dtype=torch.float32, with_lm_head=True)
layers = [router.layer for router in model.routers][-TUNED_LAYERS:]
cut = layers[0]
head = load_slice(str(MODEL), start=cut, dtype=torch.float32, with_lm_head=True)


@torch.no_grad()
def extract(rows: list[int], gold_only: bool) -> tuple[Reading, torch.Tensor]:
    """A batch's layout (each token once, no padding) and its states at the cut, after the attention: [tokens, width]."""
    reading = Reading.of(lay_out([prompts[row] for row in rows], gold_only=gold_only), [TOKENS])
    _, at_cut, _ = run_part(model, reading, None, [cut])
    return reading, at_cut[cut]


def forward(reading: Reading, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The head on one batch: logits at the tokens that are read, and r_i [questions, layers, experts] with its graph.

    r_i is the softmax over ALL experts at the last prompt token, from the routers as they are now.
    """
    with read_routing(head.model, head.routers, reading.flat_positions) as tape:
        out = run_packed(head, reading.layout.packing, states, resume=True, keep=reading.keep)
    return out.states, mean_routing(tape.routing_BPLE, reading.positions[TOKENS])


@torch.no_grad()
def answer(batches: list[tuple[list[int], Reading, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each question is answered rightly, and its r_i, by the head as it is now."""
    correct, routing = torch.zeros(len(prompts), dtype=torch.bool), torch.zeros(len(prompts), len(layers), experts)
    for rows, reading, states in batches:
        logits, routing_QLE = forward(reading, states)
        routing[rows] = routing_QLE
        for row, scores in zip(rows, choice_scores(logits, reading.keep, reading.layout), strict=True):
            correct[row] = predict(scores, prompts[row], RULE) == prompts[row].answer
    return correct, routing


experts = head.routers[0].num_experts
planned = plan_batches([own_tokens(prompt, 0) for prompt in prompts], 2048)
scoring = [(rows, *extract(rows, gold_only=False)) for rows in planned]
correct_before, routing_before = answer(scoring)

# --- Eq. 2: S, the training questions that the base model answers rightly.
training = torch.zeros(len(prompts), dtype=torch.bool)
training[train] = True
successful = successful_set(correct_before, training)

# --- Eq. 3-6: the k nearest of S by a sentence embedding of question and choices, and their weights W, which sum to 1.
texts = [by_id[p.id].question + "\n" + "\n".join(by_id[p.id].choices) for p in prompts]
embeddings = torch.from_numpy(encode(load_encoder("minilm", "cpu"), texts, 64))
neighborhoods = find_neighbors(
    embeddings,
    successful,
    training_N=training,
    ids=[p.id for p in prompts],
    text_keys=texts,
    method="knn",
    k=3,
    similarity="gaussian",
    sigma=0.5,
)
# Eq. 7 needs of the neighbors' stored r_j only their weighted mean and spread (see manifold/losses.py: exact for any k).
targets = neighbor_targets(neighborhoods, routing_before)

# --- Eq. 7-10: a few epochs over the head alone. Nothing but the gates has a gradient; they train as fp32 masters.
masters = RouterMasters(head, layers)
optimizer = torch.optim.AdamW(masters.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
print(f"{len(train)} training questions, {int(successful.sum())} in S; tuning layers {layers} of {model.num_layers}")
steps = [(rows, *extract(rows, gold_only=True)) for rows in chunks(epoch_order(train, 0, 0), BATCH)]
for epoch in range(EPOCHS):
    task_sum = manifold_sum = 0.0
    for rows, reading, states in steps:
        logits, routing_QLE = forward(reading, states)
        task = task_losses(logits, reading.keep, reading.layout, over="continuation") / len(rows)  # eq. 8
        manifold = manifold_loss(routing_QLE, targets.take(torch.tensor(rows))) / len(rows)  # eq. 7, live r_i
        loss = task + STRENGTH * manifold  # eq. 9
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(masters.parameters(), 1.0)
        optimizer.step()  # eq. 10: of all weights, the gates alone
        task_sum, manifold_sum = task_sum + len(rows) * task.item(), manifold_sum + len(rows) * manifold.item()
    print(f"epoch {epoch + 1}: task loss {task_sum / len(train):.4f}, manifold {manifold_sum / len(train):.4f}")

# --- Before and after, on the same held-out questions. One seed and a few hundred questions decide nothing: `roma-ray run`
# gives standard errors, a paired test and the routing's changes.
correct_after, _ = answer(scoring)
before, after = correct_before[test].float().mean(), correct_after[test].float().mean()
print(f"test accuracy on {len(test)} questions: {before:.2%} before, {after:.2%} after")
