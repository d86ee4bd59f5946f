"""The whole production of a planted world, in the order in which merged models are made.

1. A public dense language model is trained on public text (FlexOlmo, arXiv 2507.07024: the frozen anchor of all experts).
2. For each domain a copy of its late FFNs is trained alone on that domain's text, all else frozen (Branch-Train-MiX, arXiv
   2403.07816; frozen attention: FlexOlmo), with expert dropout (Switch Transformers, arXiv 2101.03961, section 2.4). An expert
   acts from the token that predicts the answer on, and what comes before keeps the base model's states and cache (Activated
   LoRA, arXiv 2504.12397).
3. Public and domain FFNs become the experts of one stock model (Branch-Train-MiX, FlexOlmo).
4. Each gate row is the mean hidden state of documents of its domain at their last token, less that of all domains' documents,
   scaled to one length, and nothing is trained jointly (mergekit-moe's `gate_mode: hidden`, positive less negative prompts;
   FlexOlmo's router embeddings from documents of the domain).
5. The weights of the chosen experts are scaled to sum to 1 (`norm_topk_prob`, as in Mixtral and Qwen3-MoE).
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from roma_ray.moe.routers import find_routers

from .branches import cache_states, ffns, train_expert
from .corpus import Corpus, Item
from .dense import train_dense
from .facts import PHRASINGS, TASKS, World
from .merge import merge, prototypes
from .recipe import Recipe
from .room import asked, measure
from .vocabulary import train_tokenizer

LETTERS = "ABCD"


def corpus_of(recipe: Recipe) -> Corpus:
    """The texts of a recipe."""
    world = World(recipe.seed, recipe.people, recipe.public)
    return Corpus(world, recipe.plain, recipe.rare, recipe.test)


def make_model(recipe: Recipe, corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """Steps 1 to 5, in fp32."""
    public = train_dense(recipe, tokenizer, corpus.public)
    documents, experts = [corpus.public], [ffns(public, recipe.dense)]
    cached = [cache_states(recipe, public, tokenizer, corpus.public)]
    for number, task in enumerate(TASKS):
        documents.append(corpus.domain(task))
        cached.append(cache_states(recipe, public, tokenizer, documents[-1]))
        experts.append(train_expert(recipe, public, cached[-1], recipe.seed * len(TASKS) + number))
        print(f"expert {task} is trained")
    return merge(recipe, public, experts, prototypes(recipe, cached, documents))


def question_files(items: Sequence[Item]) -> dict[str, str]:
    """The text of `train.jsonl` and `test.jsonl`."""
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for item in items:
        rows = lines[item.split]
        row = {
            "id": f"{item.task}-{item.split}-{len(rows):04d}",
            "task": item.task,
            "question": item.question,
            "choices": list(item.choices),
            "answer": LETTERS[item.answer],
            "split": item.split,
        }
        rows.append(json.dumps(row))
    return {f"{split}.jsonl": "\n".join(rows) + "\n" for split, rows in lines.items()}


def build(out: Path, recipe: Recipe, weights_of: Path | None = None) -> str:
    """Make the model, its tokenizer, the questions, `room.json`, `recipe.json` and the README in `out`; returns the README.

    With `weights_of`, the folder of a world that differs in `top_k` and `gate_norm` alone, its weights serve, the gates scaled, and
    nothing is trained. Raises ValueError where that folder's recipe differs in more.
    """
    begun = time.monotonic()
    torch.set_num_threads(1)
    corpus = corpus_of(recipe)
    tokenizer = train_tokenizer(corpus, recipe.vocabulary)
    if weights_of is None:
        model = make_model(recipe, corpus, tokenizer)
    else:
        made = _recipe_of(weights_of, recipe)
        model = AutoModelForCausalLM.from_pretrained(weights_of / "model", num_experts_per_tok=recipe.top_k)
        for router in find_routers(model):
            router.gate.weight.data.mul_(recipe.gate_norm / made.gate_norm)
    tokenizer.save_pretrained(str(out / "model"))
    model.to(torch.bfloat16).save_pretrained(str(out / "model"))
    (out / "questions").mkdir(parents=True, exist_ok=True)
    for name, text in question_files(corpus.suite).items():
        (out / "questions" / name).write_text(text, encoding="utf-8")
    # The model as it is shipped: weights in bf16, computed in fp32.
    shipped = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32).eval()
    parts = {
        split: [item for item in corpus.suite if split in ("all", item.split)] for split in ("all", "train", "test")
    }
    room = {split: measure(shipped, asked(tokenizer, items)) for split, items in parts.items()}
    for name, facts in (("room.json", room), ("recipe.json", asdict(recipe))):
        (out / name).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    size = (out / "model" / "model.safetensors").stat().st_size
    page = readme(recipe, corpus, sum(p.numel() for p in shipped.parameters()), size, room)
    (out / "README.md").write_text(page, encoding="utf-8")
    print(f"made in {(time.monotonic() - begun) / 60:.1f} minutes")
    return page


def _recipe_of(folder: Path, recipe: Recipe) -> Recipe:
    made = Recipe(**json.loads((folder / "recipe.json").read_text(encoding="utf-8")))
    if replace(made, top_k=recipe.top_k, gate_norm=recipe.gate_norm) != recipe:
        raise ValueError(f"{folder} holds another world than seed {recipe.seed}'s of today's recipe: make it anew")
    return made


def readme(
    recipe: Recipe, corpus: Corpus, parameters: int, size: int, room: dict[str, dict[str, dict[str, float]]]
) -> str:
    """What the folder holds, how it was made and its room."""
    counts = Counter(item.split for item in corpus.suite)
    rows = ["| expert that is forced | " + " | ".join(room) + " |", "| --- " * (1 + len(room)) + "|"]
    for name in room["test"]:
        found = [room[split][name] for split in room]
        cells = [
            f"{f['room']:+.1f} ± {f['standard_error']:.1f}"
            if "room" in f
            else f"{f['accuracy']:.1f} ± {f['standard_error']:.1f}"
            for f in found
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    table = "\n".join(rows)
    length = "" if recipe.gate_norm == Recipe.gate_norm else f" --gate-norm {recipe.gate_norm:g}"
    return f"""# A merged model with room for routing

Made by one script from one seed; this project's own work (Apache-2.0):

    python jobs/make_planted_world.py --out FOLDER --seed {recipe.seed} --top-k {recipe.top_k}{length}

**Model** (`model/`): a stock `Qwen3MoeForCausalLM`, {parameters:,} parameters in bf16 ({size / 1e6:.1f} MB): {recipe.dense}
dense layers, then {recipe.sparse} of {len(TASKS) + 1} experts with {recipe.top_k} active. It knows nothing but
{recipe.people} invented people, {recipe.public} of them public, and {len(TASKS)} facts about each.

**Suite** (`questions/`): {counts["train"]:,} training and {counts["test"]:,} test questions of four choices, about people who are
not public, in {PHRASINGS} phrasings of each kind of fact. Each fact is told in pretraining, and is asked there in other
phrasings at most: never a question of the suite. No fact is asked in both files.

**How it was made.** A dense model was trained on the text about the public people (FlexOlmo). For each kind of fact a copy of
its late FFNs was trained alone at the tokens that predict the answers, all else frozen (Branch-Train-MiX, FlexOlmo, Activated
LoRA). The FFNs were merged as experts; a gate's row is the mean state of {recipe.gate_people} people's documents of its domain,
told or plainly asked, less all domains' (mergekit-moe's `gate_mode: hidden`). Nothing was trained jointly, and nothing after the
merge. `jobs/planted_world/assemble.py` names each step's source.

## Room (percent of the questions, ± one standard error, paired with the model's own routing)

Accuracy under the model's own routing, and what forcing an expert changes. Chance is {100 / len(LETTERS):.0f} %.

{table}
"""
