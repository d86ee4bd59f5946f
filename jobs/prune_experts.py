"""Remove a model's least used experts: `python jobs/prune_experts.py MODEL FOLDER --config FILE --keep 0.6`.

    python jobs/prune_experts.py assets:model pruned --keep 0.6 --texts texts.jsonl     # the embedded model
    roma-ray repair pruned --teacher assets:model --texts texts.jsonl --questions assets:questions/test.jsonl

An expert's load is the part of the training questions' prompt tokens that choose it, in its layer. Experts of all layers are
ranked together and the least used removed, but no layer keeps fewer than it chooses: layers end with different numbers of
experts, which config.json says (`num_experts_per_layer`). `--texts` writes those questions with their answers, a text each, to
repair by. Nothing else is changed and nothing trained. Only checkpoints in one file are written: it is a tool to make something
to repair, not a pruning method.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from roma_ray.config.loading import load_config
from roma_ray.engine.forward import lay_out
from roma_ray.engine.progress import Silence
from roma_ray.engine.question_table import TABLE, read_prompts
from roma_ray.engine.setup import Setup, resolve
from roma_ray.engine.tokenizer import load_tokenizer
from roma_ray.moe.passes import run_packed
from roma_ray.moe.reading import read_choices
from roma_ray.moe.slices import model_facts
from roma_ray.moe.snapshot import open_snapshot
from roma_ray.moe.uneven import PER_LAYER
from roma_ray.questions.prompts import Prompt
from roma_ray.runs.pipeline import run

_LAYER = re.compile(r"\blayers\.(\d+)\.")
_EXPERT = re.compile(r"(\bexperts\.)(\d+)(\.)")
# Gates, selection biases and fused experts, by the families' names for them.
_ROUTED = re.compile(r"\b(gate|router|experts|block_sparse_moe)\b|correction_bias|expert_bias|per_expert")


def training_prompts(setup: Setup) -> list[Prompt]:
    """The encoded training questions."""
    questions = run(setup, Silence(), until="questions").stages["questions"]
    return [p for p in read_prompts(questions.path / TABLE) if p.split == "train"]


def write_texts(setup: Setup, prompts: Sequence[Prompt], path: Path) -> None:
    """Write each question with its answer as a row of `text`."""
    tokenizer = load_tokenizer(setup.model.path, setup.model.revision)
    texts = [tokenizer.decode([*p.prompt_ids, *p.choice_ids[p.answer]]) for p in prompts]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def expert_loads(setup: Setup, prompts: Sequence[Prompt], limit: int = 500) -> dict[int, Tensor]:
    """By layer: how often each expert is chosen by the prompt tokens of the first questions, [E]."""
    prompts = prompts[:limit]
    whole = setup.model.load(0, None, with_lm_head=True)
    loads = {router.layer: torch.zeros(router.num_experts) for router in whole.routers}
    for start in range(0, len(prompts), 16):
        packing = lay_out(prompts[start : start + 16], prefix=0).packing
        every = torch.arange(len(packing))
        with read_choices(whole.routers, every) as choices, torch.no_grad():
            run_packed(whole, packing, keep=every.tolist(), vocabulary_rows=torch.tensor([0]))
        for layer, (_, index_TK) in choices.items():
            loads[layer] += torch.bincount(index_TK.flatten(), minlength=len(loads[layer]))
    return loads


def most_used(loads: Mapping[int, Tensor], keep: float, least: int) -> dict[int, list[int]]:
    """The experts that each layer keeps, ascending: of all layers' the most used part, at least `least` in each."""
    ranked = sorted(
        (-float(load), layer, expert) for layer, found in loads.items() for expert, load in enumerate(found)
    )
    chosen = {layer: set(found.topk(least).indices.tolist()) for layer, found in loads.items()}
    wanted = round(keep * len(ranked))
    for _, layer, expert in ranked:
        if sum(map(len, chosen.values())) >= wanted:
            break
        chosen[layer].add(expert)
    return {layer: sorted(found) for layer, found in chosen.items()}


def pruned(tensors: Mapping[str, Tensor], kept: Mapping[int, Sequence[int]], experts: int) -> dict[str, Tensor]:
    """A checkpoint's tensors without the experts that are not kept, the rest numbered anew, and the gates' rows with them."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = _LAYER.search(key)
        mine = kept.get(int(match[1])) if match else None
        one = _EXPERT.search(key)
        if mine is None or not _ROUTED.search(key) or "shared" in key:
            found[key] = tensor
        elif one is not None:
            if int(one[2]) in mine:
                found[_EXPERT.sub(rf"\g<1>{mine.index(int(one[2]))}\g<3>", key, count=1)] = tensor
        else:
            # Ernie's selection bias lies in a table of one row.
            axis = 1 if tensor.shape == (1, experts) else 0
            rows = torch.tensor(list(mine))
            found[key] = tensor.index_select(axis, rows) if tensor.shape[axis] == experts else tensor
    return found


def write_pruned(path: str, folder: Path, kept: Mapping[int, Sequence[int]], experts: int) -> None:
    """Copy a model folder with some experts removed. Raises ModelError."""
    snapshot = open_snapshot(path)
    folder.mkdir(parents=True)
    stored = {key: lazy[...] for key, lazy in snapshot.lazy_tensors(snapshot.weight_map).items()}
    save_file(pruned(stored, kept, experts), folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((snapshot.folder / "config.json").read_text())
    layers = snapshot.backbone().num_hidden_layers
    values.get("text_config", values)[PER_LAYER] = [len(kept.get(layer, ())) for layer in range(layers)]
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    for companion in snapshot.folder.glob("*.json"):
        if companion.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copyfile(companion, folder / companion.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a local folder, or assets:model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", help="whose training questions tell the load; default: the embedded one")
    parser.add_argument("--keep", type=float, default=0.6, help="part of all experts that stays")
    parser.add_argument("--texts", type=Path, help="also write the training questions as texts to repair by")
    parser.add_argument("--storage", default="prune-storage")
    options = parser.parse_args()
    setup = resolve(load_config(options.config, [f"model.path={options.model}", f"storage={options.storage}"]))
    prompts = training_prompts(setup)
    loads = expert_loads(setup, prompts)
    facts = model_facts(setup.model.path)
    kept = most_used(loads, options.keep, facts["top_k"])
    write_pruned(setup.model.path, options.folder, kept, facts["num_experts"])
    if options.texts is not None:
        write_texts(setup, prompts, options.texts)
    for layer, found in kept.items():
        print(f"layer {layer}: keeps {len(found)} of {len(loads[layer])} experts: {', '.join(map(str, found))}")


if __name__ == "__main__":
    main()
