"""The whole production of the embedded default: tokenizer, pretraining, suite, measurements, README."""

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import OlmoeForCausalLM, PreTrainedTokenizerFast

from .corpus import overlap, suite
from .facts import NAMES, TASKS
from .items import LETTERS, Item
from .measure import Scores, cloze_scores, letter_scores, load_summary
from .pretrain import Recipe, new_model, pretrain
from .vocabulary import save_tokenizer, train_tokenizer

COUNTS = {"train": 170, "test": 75}  # questions of each family


def record(split: str, number: int, item: Item) -> dict[str, object]:
    """A suite question as one JSON object of the question files."""
    out: dict[str, object] = {
        "id": f"{item.task}-{split}-{number:04d}",
        "task": item.task,
        "question": item.question,
        "choices": list(item.choices),
        "answer": LETTERS[item.answer],
        "split": split,
    }
    return out


def suite_files(seed: int) -> dict[str, str]:
    """The text of `train.jsonl` and `test.jsonl`."""
    questions = suite(seed, COUNTS)
    lines: dict[str, list[str]] = {split: [] for split in COUNTS}
    for split, item in questions:
        lines[split].append(json.dumps(record(split, len(lines[split]), item), ensure_ascii=False))
    return {f"{split}.jsonl": "\n".join(rows) + "\n" for split, rows in lines.items()}


def _table(cloze: Scores, letter: Scores) -> str:
    rows = ["| family | cloze, train | cloze, test | letter, train | letter, test |", "| --- | --- | --- | --- | --- |"]
    for task in (*TASKS, None):
        cells = [f"{100 * s.accuracy(split, task):.1f}" for s in (cloze, letter) for split in COUNTS]
        rows.append(f"| {task or '**all**'} | {' | '.join(cells)} |")
    return "\n".join(rows)


def readme(recipe: Recipe, seconds: float, parameters: int, size: int, cloze: Scores, letter: Scores) -> str:
    """The README that stands in the assets: what they are, what they cost and what the base model can do."""
    assert letter.load is not None
    between = [t for t in TASKS if 35 <= 100 * cloze.accuracy("train", t) <= 90]
    asked = {split: sum(n for key, n in cloze.asked.items() if key[0] == split) for split in COUNTS}
    return f"""# The embedded default

A small mixture-of-experts language model and a question suite, so that the whole method runs without a hub, a GPU or an
account. Both are this project's own work (Apache-2.0), made by one script from a fixed seed:

    python jobs/make_demo_assets.py --out roma_ray/assets

**Model** (`model/`): stock `OlmoeForCausalLM`, {parameters:,} parameters in bf16 ({size / 1e6:.1f} MB), 10 layers of 16
experts with 2 active, byte-level BPE tokenizer of {recipe.vocabulary:,} tokens at most (any UTF-8 text has tokens). It knows nothing but
{len(NAMES)} invented people and {len(TASKS)} facts about each, told in short sentences, some of them more often than others.

**Suite** (`questions/`): {len(TASKS)} families, one a kind of fact, {asked["train"]:,} training and {asked["test"]:,} test questions
of four choices.

**Cost**: {recipe.steps:,} steps, {seconds / 60:.0f} minutes of training on 2 CPU cores. The run has two one-thread workers and
sums their gradients in one order, so that the same machine and versions give the same bits; another kind of
CPU may round differently.

**What the pretraining text does not contain.** Every fact is told in it as a plain sentence ("Mira lives in Paris."). Asked
("Question: Where does Mira live?") are only those that a hash of family and name puts on the pretraining side; the training
and test questions are the others. So the suite asks for what the model was told but never asked. `tests/assets` makes the
stream again and checks it. Nothing was selected for or against any method: the model is the last step of its run.

## Base accuracy (percent), measured by the script

`cloze` is the demo's prompt (`Question: ...\nAnswer:`, scored by the choices' log-likelihood per character). `letter` (lettered
choices, then `Answer:`) works with this model but is at chance, since its text holds no lettered question: a model this small
does not learn what a letter stands for within the budget. A family has about 170 training and 70 test questions: one standard
error is about 4 and 6 points. Chance is 25 %.

{_table(cloze, letter)}

{len(between)} families lie between 35 and 90 % on the training questions: {", ".join(between)}.

Routing at the last token of the lettered prompts: {load_summary(letter.load)}.
"""


def measure(
    tokenizer: PreTrainedTokenizerFast, recipe: Recipe, state: dict[str, torch.Tensor]
) -> tuple[Scores, Scores]:
    """Cloze and letter scores of the model as saved (bf16 weights, computed in fp32)."""
    model = new_model(recipe).eval()
    model.load_state_dict({name: tensor.to(torch.bfloat16).float() for name, tensor in state.items()})
    questions = suite(recipe.seed, COUNTS)
    return cloze_scores(model, tokenizer, questions), letter_scores(model, tokenizer, questions)


def save_model(model: OlmoeForCausalLM, folder: Path) -> int:
    """Write the model in bf16; returns the bytes of its weights."""
    model.to(torch.bfloat16).save_pretrained(str(folder))
    return (folder / "model.safetensors").stat().st_size


def build(out: Path, work: Path, recipe: Recipe) -> str:
    """Make all assets in `out`, keeping the resumable run in `work`; returns the README's text."""
    begun = time.monotonic()
    tokenizer = train_tokenizer(recipe.seed, recipe.vocabulary)
    save_tokenizer(tokenizer, work / "tokenizer")
    model, seconds = pretrain(recipe, work / "tokenizer", work)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = sum(p.numel() for p in model.parameters())
    cloze, letter = measure(tokenizer, recipe, state)
    questions = [item for _, item in suite(recipe.seed, COUNTS)]
    assert not overlap(recipe.seed, range(-1, recipe.steps), recipe.workers, recipe.documents, questions)
    shutil.rmtree(out / "model", ignore_errors=True)
    save_tokenizer(tokenizer, out / "model")
    size = save_model(model, out / "model")
    (out / "questions").mkdir(parents=True, exist_ok=True)
    for name, text in suite_files(recipe.seed).items():
        (out / "questions" / name).write_text(text, encoding="utf-8")
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    page = readme(recipe, seconds, parameters, size, cloze, letter)
    (out / "README.md").write_text(page, encoding="utf-8")
    print(f"made in {(time.monotonic() - begun) / 60:.1f} minutes ({seconds / 60:.1f} of them training)")
    return page
