"""In-context learning: solved training questions before each question, the nearest ones by embedding similarity."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch

from roma_ray.baselines.bench import Bench, training_mask
from roma_ray.baselines.contract import Fitted, Method
from roma_ray.baselines.whole_model import score_whole
from roma_ray.config.schema import Config
from roma_ray.engine.answers import Answers
from roma_ray.engine.batches import plan_batches
from roma_ray.engine.forward import own_tokens
from roma_ray.engine.question_table import TABLE, read_table
from roma_ray.engine.tokenizer import load_tokenizer
from roma_ray.manifold.neighbors import find_neighbors
from roma_ray.questions.prompts import Prompt, PromptBuilder
from roma_ray.questions.records import Question
from roma_ray.stages.embedding import embedding_texts

_SEPARATOR = "\n\n"


class InContext(Method):
    """n-shot prompting; demonstrations come from the training questions in use, right answers included."""

    name = "icl"
    title = "solved training questions before each question, the nearest by embedding"
    runs_whole_model = True
    works_on = "test"

    def configure(self, config: Config) -> dict[str, Any]:
        """The number of demonstrations."""
        return {"shots": config.baselines.shots}

    def parts(self, bench: Bench) -> list[list[int]]:
        """By the lengths of the longer prompts."""
        rows, prompts = bench.rows["test"], self._of_test(bench)
        planned = plan_batches([own_tokens(prompts[row], 0) for row in rows], bench.data.batch_tokens)
        return [[rows[n] for n in batch] for batch in planned]

    def work(self, bench: Bench, rows: Sequence[int], seed: int) -> Answers:
        """As `predict`; the demonstrations of all test questions are searched at once."""
        prompts = self._of_test(bench)
        return Answers(list(rows), score_whole(bench, [prompts[row] for row in rows]))

    def _of_test(self, bench: Bench) -> dict[int, Prompt]:
        rows = bench.rows["test"]
        return bench.once("icl prompts", lambda: dict(zip(rows, self.prompts(bench, rows), strict=True)))

    def predict(self, bench: Bench, fitted: Fitted, rows: Sequence[int], seed: int) -> Answers:
        """The whole model's answers to the longer prompts."""
        prompts = self.prompts(bench, rows)
        return Answers(list(rows), score_whole(bench, prompts))

    def prompts(self, bench: Bench, rows: Sequence[int]) -> list[Prompt]:
        """The questions' prompts with their demonstrations, the nearest one last; as many as fit `prompt.max_tokens`."""
        setup = bench.setup
        limit = setup.config.questions.prompt.max_tokens
        builder = PromptBuilder(load_tokenizer(setup.model.path, setup.model.revision), setup.config.questions.prompt)
        near = demonstrations(bench, rows)
        solved = _solved(bench, builder, sorted({n for found in near for n in found}))
        start = builder.prefix_ids
        built = []
        for row, found in zip(rows, near, strict=True):
            prompt = bench.data.prompts[row]
            own = prompt.prompt_ids[len(start) :]
            longest = max(len(ids) for ids in prompt.choice_ids)
            for count in range(len(found), -1, -1):
                # The nearest demonstration stands last, next to the question.
                before = (*start, *(token for n in reversed(found[:count]) for token in solved[n]))
                if len(before) + len(own) + longest <= limit:
                    break
            built.append(dataclasses.replace(prompt, prompt_ids=(*before, *own)))
        return built


def demonstrations(bench: Bench, rows: Sequence[int]) -> list[list[int]]:
    """Each question's nearest training questions, nearest first: never itself, nor one with an equal text."""
    config = bench.setup.config
    training_N = training_mask(bench)
    queried_N = torch.zeros_like(training_N)
    queried_N[list(rows)] = True
    near = find_neighbors(
        bench.embeddings_NC,
        training_N,
        training_N=training_N,
        queried_N=queried_N,
        ids=[p.id for p in bench.data.prompts],
        text_keys=embedding_texts(bench.stages["questions"], config.embedding.context),
        k=bench.config.shots,
        similarity="cosine",
        sigma=config.neighbors.sigma,
    )
    return [near.of(row)[0].tolist() for row in rows]


def _solved(bench: Bench, builder: PromptBuilder, rows: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Tokens of each training question as a demonstration: its prompt, its right choice, and an empty line."""
    columns = ["id", "task", "question", "choices", "answer", "context"]
    table = read_table(bench.stages["questions"].path / TABLE, columns).take(pa.array(rows, pa.int64()))
    questions = [Question(**{**row, "choices": tuple(row["choices"])}) for row in table.to_pylist()]
    end = builder.tokenizer(_SEPARATOR, add_special_tokens=False)["input_ids"]
    found = {}
    for row, question, prompt in zip(rows, questions, builder.build_batch(questions), strict=True):
        assert isinstance(prompt, Prompt), "a question in use has a prompt"
        own = prompt.prompt_ids[len(builder.prefix_ids) :]
        found[row] = (*own, *prompt.choice_ids[question.answer], *end)
    return found
