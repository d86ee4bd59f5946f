"""A judged model at work: log-likelihoods of continuations, and generations.

T flat tokens, N tokens whose logits are read, P tokens of a continuation, D width, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from roma_ray.benchmarks.judged_model import Subject
from roma_ray.benchmarks.padded_scoring import lay_out_sheets, sheet_logits
from roma_ray.benchmarks.request_tree import Path, grow
from roma_ray.errors import GuardError
from roma_ray.moe.adapters import RouterCheckpoint, put_routers
from roma_ray.moe.exporting import read_routers
from roma_ray.moe.finite import begins, watching
from roma_ray.moe.packing import Packing, Segment, pack
from roma_ray.moe.passes import run_packed
from roma_ray.moe.slices import Slice


@dataclass
class BatchAnswers:
    """A batch's answers by model (`base`, `tuned`) and what they cost."""

    answers: dict[str, list[Any]] = field(default_factory=dict)
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """Of the trunk, which both share, and of each model's head."""
    flops: dict[str, int] = field(default_factory=dict)
    kept: Kept | None = None


class Routers:
    """The base's and the tuned gates of a loaded slice, exchanged in place."""

    def __init__(self, part: Slice, adapter: str) -> None:
        """Read the adapter. Raises CheckpointError; GuardError when its gates are the base's own."""
        tuned = read_routers(adapter, base=part.path, revision=part.revision)
        self.part, self.current = part, "base"
        modules = {router.whole_name: router.gate for router in part.routers}
        own = {}
        for key in tuned.tensors:
            name, _, tensor = key.rpartition(".")
            if name in modules:
                own[key] = modules[name].get_parameter(tensor).detach().clone()
        base = RouterCheckpoint(**{**tuned.__dict__, "tensors": own, "extras": {}})
        self.states = {"base": base, "tuned": tuned}
        self.put("tuned")
        same = all(bool((modules_parameter(modules, key) == value).all()) for key, value in own.items())
        self.put("base")
        if same:
            raise GuardError(
                f"every gate in {adapter} equals the base model's: nothing was tuned, or what was tuned was not exported. "
                "Inspect the adapter with `roma-ray inspect`."
            )

    def put(self, name: str) -> None:
        """Make `base` or `tuned` the slice's gates."""
        if name != self.current:
            put_routers(self.states[name], self.part)
            self.current = name


def modules_parameter(modules: dict[str, Any], key: str) -> Tensor:
    """The loaded tensor of a checkpoint's key."""
    name, _, tensor = key.rpartition(".")
    parameter: Tensor = modules[name].get_parameter(tensor)
    return parameter


@dataclass(frozen=True)
class Kept:
    """What a batch leaves for later adapters of the same cut: the trunk's states and the base's answers."""

    states_TD: Tensor
    base: list[tuple[float, bool]]


class Scorer(Protocol):
    """Scores continuations after contexts."""

    def score(
        self, paths: Sequence[Path], continuations: Sequence[Path], *, count: bool = False, kept: Kept | None = None
    ) -> BatchAnswers:
        """(log-likelihood, whether greedy) of each continuation, whose tokens its path's last positions predict.

        `count` also counts the floating-point operations, in a pass of its own. `kept` is an earlier result's, of the same paths.
        """


class SliceScorer:
    """Base and tuned from one pass through the trunk, on packed token trees."""

    def __init__(self, subject: Subject, trunk: Slice | None, head: Slice, routers: Routers | None) -> None:
        self.subject, self.trunk, self.head, self.routers = subject, trunk, head, routers

    @torch.inference_mode()
    def score(
        self, paths: Sequence[Path], continuations: Sequence[Path], *, count: bool = False, kept: Kept | None = None
    ) -> BatchAnswers:
        """As `Scorer.score`."""
        tree = grow(paths)
        packing = pack([Segment(s.ids, s.parent) for s in tree.segments])
        read = [
            [packing.flat(segment, offset) for segment, offset in tree.places(path, len(tokens))]
            for path, tokens in zip(paths, continuations, strict=True)
        ]
        keep = sorted({place for places in read for place in places})
        column = {place: n for n, place in enumerate(keep)}
        result = BatchAnswers(tokens=len(packing))
        device = self.head.device
        if kept is None:
            states_TD = timed(result, "trunk", device, partial(self._trunk, packing))
        else:
            states_TD, result.answers["base"] = kept.states_TD, kept.base
        heads = {n: partial(self._head, n, packing, states_TD, keep) for n in self.subject.names}
        for name, run in heads.items():
            if name not in result.answers:
                logits_NV = timed(result, name, device, run)
                result.answers[name] = [
                    likelihood(logits_NV[[column[place] for place in places]], tokens)
                    for places, tokens in zip(read, continuations, strict=True)
                ]
        if count and kept is None:
            count_flops(result, {"trunk": partial(self._trunk, packing), **heads})
        if kept is None and states_TD is not None:
            result.kept = Kept(states_TD, result.answers["base"])
        refuse_not_finite(result.answers, lambda name, request: self._origin(name, paths[request]))
        return result

    def _origin(self, name: str, path: Path) -> str | None:
        """Where the values of one path, alone, first stop being finite."""
        packing = pack([Segment(segment.ids, segment.parent) for segment in grow([path]).segments])
        with ExitStack() as stack:
            parts = [part for part in (self.trunk, self.head) if part is not None]
            seen = [stack.enter_context(watching(part.model, part.start)) for part in parts]
            self._head(name, packing, self._trunk(packing), list(range(len(packing))))
        return next((watch.origin for watch in seen if watch.origin), None)

    def _trunk(self, packing: Packing) -> Tensor | None:
        return None if self.trunk is None else run_packed(self.trunk, packing).states

    def _head(self, name: str, packing: Packing, states_TD: Tensor | None, keep: Sequence[int]) -> Tensor:
        if self.routers is not None:
            self.routers.put(name)
        logits_NV: Tensor = run_packed(self.head, packing, states_TD, keep=keep).states
        return logits_NV


class WholeScorer:
    """A stock model, alone, on padded batches."""

    def __init__(self, subject: Subject, model: PreTrainedModel) -> None:
        self.subject, self.model = subject, model

    @torch.inference_mode()
    def score(
        self, paths: Sequence[Path], continuations: Sequence[Path], *, count: bool = False, kept: Kept | None = None
    ) -> BatchAnswers:
        """As `Scorer.score`."""
        answers: list[Any] = [None] * len(paths)
        result = BatchAnswers(answers={"base": answers}, seconds={"trunk": 0.0})
        for sheet in lay_out_sheets(paths, continuations, self.subject.batch_tokens):
            result.tokens += int(sheet.mask_BS.sum())
            run = partial(sheet_logits, self.model, sheet)
            logits_BPV = timed(result, "base", self.model.device, run)
            for request, sequence, first in sheet.reads:
                wanted = continuations[request]
                answers[request] = likelihood(logits_BPV[sequence, first : first + len(wanted)], wanted)
            if count:
                count_flops(result, {"base": run})
        refuse_not_finite(result.answers, lambda name, request: self._origin(paths[request], continuations[request]))
        return result

    def _origin(self, path: Path, continuation: Path) -> str | None:
        """Where the values of one path, alone, first stop being finite."""
        with watching(self.model) as seen:
            sheet_logits(self.model, lay_out_sheets([path], [continuation], self.subject.batch_tokens)[0])
        return seen.origin


def refuse_not_finite(
    answers: Mapping[str, Sequence[tuple[float, bool]]], origin: Callable[[str, int], str | None]
) -> None:
    """A benchmark is whole or refused: raise GuardError where a log-likelihood is not finite.

    `origin` tells where that begins, of a model's name and a request's number.
    """
    for name, found in answers.items():
        bad = [n for n, (value, _) in enumerate(found) if not math.isfinite(value)]
        if bad:
            raise GuardError(
                f"the {name} model's log-likelihoods of {len(bad)} of {len(found)} requests of a batch are not finite; of the "
                f"first of them, {begins(origin(name, bad[0]))}"
            )


def timed(result: BatchAnswers, part: str, device: torch.device, run: Callable[[], Any]) -> Any:
    """What `run` returns; its time is added to the part's."""
    started = now(device)
    value = run()
    result.seconds[part] = result.seconds.get(part, 0.0) + now(device) - started
    return value


def count_flops(result: BatchAnswers, parts: Mapping[str, Callable[[], Any]]) -> None:
    """Count the floating-point operations of some calls and add them to their parts'."""
    from torch.utils.flop_counter import FlopCounterMode

    for part, run in parts.items():
        with FlopCounterMode(display=False) as counter:
            run()
        result.flops[part] = result.flops.get(part, 0) + counter.get_total_flops()


def likelihood(logits_PV: Tensor, tokens: Path) -> tuple[float, bool]:
    """Log-likelihood of some tokens in nats, summed in fp32, and whether each is the likeliest: lm-eval's loglikelihood."""
    wanted_P = torch.tensor(tokens, device=logits_PV.device)
    logp_PV = torch.log_softmax(logits_PV.float(), dim=-1)
    greedy = bool((logits_PV.argmax(-1) == wanted_P).all())
    return float(logp_PV.gather(1, wanted_P[:, None]).sum()), greedy


def now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Writer:
    """Continues prompts, exactly as lm-eval's own Hugging Face model does: it is one."""

    def __init__(self, subject: Subject, model: PreTrainedModel, tokenizer: Any, routers: Routers | None) -> None:
        from lm_eval.models.huggingface import HFLM

        self.subject, self.routers = subject, routers
        self.stock = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=subject.generation_batch)

    @torch.inference_mode()
    def write(self, prompts: Sequence[str], arguments: dict[str, Any], seed: int) -> BatchAnswers:
        """The texts after some prompts; `seed` serves arguments that ask for sampling."""
        from lm_eval.api.instance import Instance

        result = BatchAnswers()
        device = self.stock.model.device
        for name in self.subject.names:
            if self.routers is not None:
                self.routers.put(name)
            torch.manual_seed(seed)
            asked = [
                Instance(request_type="generate_until", doc={}, arguments=(prompt, dict(arguments)), idx=n)
                for n, prompt in enumerate(prompts)
            ]
            started = now(device)
            with self._watched_logits() as finite:
                result.answers[name] = self.stock.generate_until(asked, disable_tqdm=True)
            result.seconds[name] = now(device) - started
            if not bool(torch.stack(finite).all()):
                raise GuardError(
                    f"the {name} model's logits are not finite while it writes; of a prompt, {begins(self._origin(prompts))}"
                )
        result.tokens = sum(len(self.stock.tok_encode(p)) for p in prompts)
        return result

    @contextmanager
    def _watched_logits(self) -> Iterator[list[Tensor]]:
        """Whether the logits that each next token is chosen from are finite, on the device: one flag a step."""
        flags: list[Tensor] = []

        def see(module: Any, inputs: Any, output: Tensor) -> None:
            # Left padding: the last place is every prompt's own.
            flags.append(torch.isfinite(output[:, -1]).all())

        handle = self.stock.model.get_output_embeddings().register_forward_hook(see)
        try:
            yield flags
        finally:
            handle.remove()

    def _origin(self, prompts: Sequence[str]) -> str | None:
        """Where values first stop being finite, of the first prompt that has any such."""
        for prompt in prompts:
            with watching(self.stock.model) as seen:
                self.stock.model(torch.tensor([self.stock.tok_encode(prompt)], device=self.stock.model.device))
            if seen.origin is not None:
                return seen.origin
        return None


def load_scorer(subject: Subject) -> Scorer:
    """Load a subject's trunk and head, in the judged type. Raises ModelError, CheckpointError, GuardError."""
    if not subject.sliced:
        return WholeScorer(subject, subject.load_whole())
    trunk = subject.model.load(0, subject.cut, with_lm_head=False) if subject.cut else None
    head = subject.model.load(subject.cut, None, with_lm_head=True)
    routers = None if subject.adapter is None else Routers(head, subject.adapter)
    return SliceScorer(subject, trunk, head, routers)


def load_writer(subject: Subject) -> Writer:
    """Load a subject whole, with its tokenizer and generation settings. Raises ModelError, CheckpointError, GuardError."""
    from transformers import GenerationConfig

    from roma_ray.engine.tokenizer import load_tokenizer

    spec = subject.model
    tokenizer = load_tokenizer(spec.path, spec.revision)
    if not subject.sliced:
        return Writer(subject, subject.load_whole(), tokenizer, None)
    whole = spec.load(0, None, with_lm_head=True)
    try:
        whole.model.generation_config = GenerationConfig.from_pretrained(spec.path, revision=spec.revision)
    except OSError:
        # A model without the file generates by what its configuration says, as stock does.
        whole.model.generation_config = GenerationConfig.from_model_config(whole.model.config)
    routers = None if subject.adapter is None else Routers(whole, subject.adapter)
    return Writer(subject, whole.model, tokenizer, routers)
