"""The whole production of the embedded default: tokenizer, pretraining, suite, measurements, README."""

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import OlmoeForCausalLM, PreTrainedTokenizerFast

from .corpus import TASKS, overlap, suite
from .items import LETTERS, Item
from .measure import Scores, cloze_scores, letter_scores, load_summary
from .pretrain import Recipe, new_model, pretrain
from .vocabulary import save_tokenizer, train_tokenizer

COUNTS = {"train": 150, "test": 60}  # questions of each family


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
    if item.context is not None:
        out["context"] = item.context
    return out


def suite_files(seed: int) -> dict[str, str]:
    """The text of `train.jsonl` and `test.jsonl`."""
    questions = suite(seed, COUNTS)
    lines: dict[str, list[str]] = {split: [] for split in COUNTS}
    for split, item in questions:
        lines[split].append(json.dumps(record(split, len(lines[split]), item), ensure_ascii=False))
    return {f"{split}.jsonl": "\n".join(rows) + "\n" for split, rows in lines.items()}


def _table(letter: Scores, cloze: Scores) -> str:
    rows = ["| family | letter, train | letter, test | cloze, train | cloze, test |", "| --- | --- | --- | --- | --- |"]
    for task in (*TASKS, None):
        cells = [f"{100 * s.accuracy(split, task):.1f}" for s in (letter, cloze) for split in COUNTS]
        rows.append(f"| {task or '**all**'} | {' | '.join(cells)} |")
    return "\n".join(rows)


def readme(recipe: Recipe, seconds: float, parameters: int, size: int, letter: Scores, cloze: Scores) -> str:
    """The README that stands in the assets: what they are, what they cost and what the base model can do."""
    assert letter.load is not None
    between = [t for t in TASKS if 35 <= 100 * letter.accuracy("train", t) <= 90]
    mean = {name: sum(s.tokens) / len(s.tokens) for name, s in (("letter", letter), ("cloze", cloze))}
    return f"""# The embedded default

A small mixture-of-experts language model and a question suite, so that the whole method runs without a hub, a GPU or an
account. Both are this project's own work (Apache-2.0), made by one script from a fixed seed:

    python jobs/make_demo_assets.py --out roma_ray/assets

**Model** (`model/`): stock `OlmoeForCausalLM`, {parameters:,} parameters in bf16 ({size / 1e6:.1f} MB), 10 layers of 16
experts with 2 active, byte-level BPE tokenizer of {recipe.vocabulary} tokens (any UTF-8 text has tokens). It knows nothing but
short generated English text about the families below; rows are at most a few hundred tokens long.

**Suite** (`questions/`): {len(TASKS)} families, {COUNTS["train"] * len(TASKS):,} training and {COUNTS["test"] * len(TASKS):,} test questions, two to five choices.

**Cost**: {recipe.steps:,} steps, {seconds / 60:.0f} minutes on 2 CPU cores, everything included two minutes more. The run has two
one-thread workers and sums their gradients in one order, so that the same machine and versions give the same bits;
another kind of CPU may round differently.

**What the pretraining text does not contain.** All possible questions of a family are split by a hash of their content
(the words, names or numbers, whatever their order): the pretraining stream takes one side, the training and test
questions the other. Besides, one third of the wordings of a question occur in the suite only, so that no question
text of the suite is ever seen. For `category` and `opposite` the plain facts ("A tiger is a animal.") of all words are
in the pretraining text, the suite's questions about them are not. `tests/assets` makes the stream again and checks it.
Nothing was selected for or against any method: the model is the last step of its run.

## Base accuracy (percent), measured by the script

`letter` is the default prompt (instruction, lettered choices, `Answer:`; {mean["letter"]:.0f} tokens on average, {max(letter.tokens)} at most), `cloze` is
`Question: …\\nAnswer:` scored by the choices' log-likelihood divided by their characters ({mean["cloze"]:.0f} tokens). Families whose
question cannot be answered without its choices (`odd`, `largest`, …) are guesses in `cloze`. A family has {COUNTS["train"]} training
and {COUNTS["test"]} test questions: one standard error is about 4 and 6 points. Chance is 20-50 %, 25 % where there are four choices.

{_table(letter, cloze)}

{len(between)} families lie between 35 and 90 % on the training questions: {", ".join(between)}.

Routing at the last prompt token of the suite: {load_summary(letter.load)}.
"""


def measure(
    folder: Path, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, state: dict[str, torch.Tensor]
) -> tuple[Scores, Scores]:
    """Scores of the model as saved (bf16 weights, computed in fp32) in both prompt formats."""
    model = new_model(recipe).eval()
    model.load_state_dict({name: tensor.to(torch.bfloat16).float() for name, tensor in state.items()})
    questions = suite(recipe.seed, COUNTS)
    return letter_scores(model, tokenizer, questions), cloze_scores(model, tokenizer, questions)


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
    letter, cloze = measure(work, tokenizer, recipe, state)
    questions = [item for _, item in suite(recipe.seed, COUNTS)]
    assert not overlap(recipe.seed, range(-1, recipe.steps), recipe.workers, recipe.documents, questions)
    shutil.rmtree(out / "model", ignore_errors=True)
    save_tokenizer(tokenizer, out / "model")
    size = save_model(model, out / "model")
    (out / "questions").mkdir(parents=True, exist_ok=True)
    for name, text in suite_files(recipe.seed).items():
        (out / "questions" / name).write_text(text, encoding="utf-8")
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    page = readme(recipe, seconds, parameters, size, letter, cloze)
    (out / "README.md").write_text(page, encoding="utf-8")
    print(f"made in {(time.monotonic() - begun) / 60:.1f} minutes ({seconds / 60:.1f} of them training)")
    return page
