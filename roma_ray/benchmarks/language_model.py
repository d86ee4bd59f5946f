"""The language model that lm-eval's tasks see: requests go to the planned batches of `requests`, answers come back.

It is lm-eval's own Hugging Face model around a model without weights: tokenization, rolling windows, chat template and
the longest input are stock's own code, so they cannot differ from it. Import this file only where lm-eval is needed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from roma_ray.benchmarks.judged_model import Subject
from roma_ray.benchmarks.requests import RequestAnswers, Scorable, Writable
from roma_ray.borders.templates import chat_text
from roma_ray.engine.tokenizer import load_tokenizer
from roma_ray.errors import ConfigError, ModelError

Ask = Callable[[str, Sequence[Scorable] | Sequence[Writable]], RequestAnswers]
"""(`loglikelihood` or `generate_until`, requests) -> answers of all judged models."""


class JudgeLM(HFLM):
    """Answers as `which` of the judged models; the first to be asked makes `ask` answer for all of them."""

    def __init__(self, subject: Subject, ask: Ask) -> None:
        tokenizer = load_tokenizer(subject.model.path, subject.model.revision)
        tokenizer.apply_chat_template = partial(chat_text, tokenizer)
        # One batch for all rolling windows: how requests are batched is the plan's business.
        super().__init__(pretrained=subject.skeleton(), tokenizer=tokenizer, backend="causal", batch_size=1 << 40)
        self.subject, self.ask = subject, ask
        self._vocabulary: int = self.model.get_input_embeddings().num_embeddings
        self.which = "base"
        self.truncated = 0
        """Requests of the current run whose start was cut off to fit the model."""
        self.answered: list[RequestAnswers] = []
        self.tokens: dict[tuple[str, str], int] = {}
        """Tokens of each continuation, by (context, continuation)."""

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood and whether greedy, by stock's tokenization, without its progress bar."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihoods of whole texts, by stock's windows, without its progress bar."""
        found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        asked = [self._scorable(context, continuation) for _, context, continuation in requests]
        self.tokens.update({texts: len(continuation) for texts, _, continuation in requests})
        found: list[tuple[float, bool]] = self._answers("loglikelihood", asked)
        return found

    def _scorable(self, context: list[int], continuation: list[int]) -> Scorable:
        """The request cut on the left to the longest input, as stock cuts it."""
        assert context
        assert 0 < len(continuation) <= self.max_length
        if max(*context, *continuation) >= self._vocabulary:
            raise ModelError(
                f"the tokenizer of {self.subject.model.path} gives token {max(*context, *continuation)}, beyond the model's "
                f"vocabulary of {self._vocabulary}: tokenizer and model do not belong together"
            )
        room = self.max_length + 1 - len(continuation)
        self.truncated += len(context) > room
        return Scorable(tuple(context[-room:]), tuple(continuation))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts after the requests' contexts."""
        repeats: Counter[tuple[str, str]] = Counter()
        asked = []
        for request in requests:
            context, arguments = request.args
            text = json.dumps(arguments, sort_keys=True)
            # Greedy repeats are one request; sampled ones are as many as are asked for.
            number = repeats[context, text] if arguments.get("do_sample") else 0
            repeats[context, text] += 1
            asked.append(Writable(context, text, number))
            self.truncated += self._too_long(context, arguments)
        found: list[str] = self._answers("generate_until", asked)
        return found

    def _too_long(self, context: str, arguments: dict[str, Any]) -> bool:
        wanted = int(normalize_gen_kwargs(dict(arguments), self.max_gen_toks)["max_gen_toks"])
        room = self.max_length - wanted
        if room <= 0:
            raise ConfigError(
                f"a task asks for {wanted} generated tokens, but the model takes {self.max_length} in all: leave the task out"
            )
        return len(self.tok_encode(context)) > room

    def _answers(self, kind: str, asked: Sequence[Any]) -> list[Any]:
        if not asked:
            return []
        answers = self.ask(kind, asked)
        if answers.stage.fingerprint not in {a.stage.fingerprint for a in self.answered}:
            self.answered.append(answers)
        if self.which == "base":
            return answers.base
        assert answers.tuned is not None
        return answers.tuned

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results about the model."""
        spec = self.subject.model
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": f"torch.{spec.dtype}",
            "model_revision": spec.revision or "",
            "model_sha": self.subject.model_identity,
            "adapter_sha": self.subject.adapter_identity if self.which == "tuned" else None,
        }
