"""A judged model at work: log-likelihoods of continuations, and generations.

B sequences, S longest sequence, P read positions, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from roma_ray.errors import GuardError
from roma_ray.evaluation.subject import Subject
from roma_ray.evaluation.tree import Path
from roma_ray.moe.checkpoints import RouterCheckpoint, put_routers, read_adapter
from roma_ray.moe.slices import Slice, slice_hidden, slice_logits


@dataclass
class Result:
    """A batch's answers by model (`base`, `tuned`) and what they cost."""

    answers: dict[str, list[Any]] = field(default_factory=dict)
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """Of the trunk, which both share, and of each model's head."""
    flops: dict[str, int] = field(default_factory=dict)


class Routers:
    """The base's and the tuned gates of a loaded slice, exchanged in place."""

    def __init__(self, part: Slice, adapter: str) -> None:
        """Read the adapter. Raises CheckpointError; GuardError when its gates are the base's own."""
        tuned = read_adapter(adapter)
        self.part, self.current = part, "base"
        modules = {router.whole_name: router.module for router in part.routers}
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
class _Sheet:
    """Some padded sequences and what is read from them."""

    ids_BS: Tensor
    mask_BS: Tensor
    positions_BP: Tensor
    reads: list[tuple[int, int, int]]
    """(request, sequence, first of its columns in `positions_BP`)."""


class Scorer:
    """Scores continuations with a model's trunk (or none) and head."""

    def __init__(self, subject: Subject, trunk: Slice | None, head: Slice, routers: Routers | None) -> None:
        self.subject, self.trunk, self.head, self.routers = subject, trunk, head, routers

    @torch.inference_mode()
    def score(self, paths: Sequence[Path], continuations: Sequence[Path], *, count: bool = False) -> Result:
        """(log-likelihood, whether greedy) of each continuation, whose tokens its path's last positions predict.

        `count` also counts the floating-point operations, in a pass of its own.
        """
        result = Result(answers={name: [None] * len(paths) for name in self.subject.names})
        for sheet in _sheets(paths, continuations, self.subject.batch_tokens):
            result.tokens += int(sheet.mask_BS.sum())
            inputs = self._timed(result, "trunk", lambda sheet=sheet: self._trunk(sheet))
            for name in self.subject.names:
                logits_BPV = self._timed(result, name, lambda name=name, x=inputs, s=sheet: self._head(name, x, s))
                for request, sequence, first in sheet.reads:
                    wanted = continuations[request]
                    rows_PV = logits_BPV[sequence, first : first + len(wanted)]
                    result.answers[name][request] = likelihood(rows_PV, wanted)
            if count:
                self._count(result, inputs, sheet)
        return result

    def _trunk(self, sheet: _Sheet) -> Tensor:
        return sheet.ids_BS if self.trunk is None else slice_hidden(self.trunk, sheet.ids_BS, sheet.mask_BS)

    def _head(self, name: str, inputs: Tensor, sheet: _Sheet) -> Tensor:
        if self.routers is not None:
            self.routers.put(name)
        return slice_logits(self.head, inputs, sheet.mask_BS, sheet.positions_BP)

    def _timed(self, result: Result, part: str, run: Callable[[], Tensor]) -> Tensor:
        device = self.head.device
        started = now(device)
        value = run()
        result.seconds[part] = result.seconds.get(part, 0.0) + now(device) - started
        return value

    def _count(self, result: Result, inputs: Tensor, sheet: _Sheet) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        parts = {"trunk": lambda: self._trunk(sheet)}
        parts |= {name: (lambda name=name: self._head(name, inputs, sheet)) for name in self.subject.names}
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


def _sheets(paths: Sequence[Path], continuations: Sequence[Path], budget: int) -> list[_Sheet]:
    """Padded batches of at most `budget` tokens; a path that begins another one is read from it."""
    ordered = sorted(set(paths))
    # Sorted, a path stands right before those that go on from it.
    longest: dict[Path, Path] = {}
    for number in range(len(ordered) - 1, -1, -1):
        path = ordered[number]
        after = ordered[number + 1] if number + 1 < len(ordered) else ()
        longest[path] = longest[after] if after[: len(path)] == path else path
    readers: dict[Path, list[int]] = {}
    for request, path in enumerate(paths):
        readers.setdefault(longest[path], []).append(request)
    rows = sorted(readers, key=lambda p: (-len(p), p))
    sheets, group = [], list[Path]()
    for row in rows:
        if group and len(group[0]) * (len(group) + 1) > budget:
            sheets.append(_sheet(group, readers, paths, continuations))
            group = []
        group.append(row)
    if group:
        sheets.append(_sheet(group, readers, paths, continuations))
    return sheets


def _sheet(
    rows: Sequence[Path], readers: dict[Path, list[int]], paths: Sequence[Path], continuations: Sequence[Path]
) -> _Sheet:
    reads, positions = [], []
    for sequence, row in enumerate(rows):
        # Requests that end at one place (single-token choices of a question) read it once.
        wanted: dict[tuple[int, int], int] = {}
        columns: list[int] = []
        for request in readers[row]:
            stop, length = len(paths[request]), len(continuations[request])
            if (stop, length) not in wanted:
                wanted[stop, length] = len(columns)
                columns += range(stop - length, stop)
            reads.append((request, sequence, wanted[stop, length]))
        positions.append(columns)
    return _Sheet(_padded(rows, 0), _padded([(1,) * len(r) for r in rows], 0), _padded(positions, -1), reads)


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    width = max(len(r) for r in rows)
    return torch.tensor([[*r, *[fill] * (width - len(r))] for r in rows], dtype=torch.long)


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
    def write(self, prompts: Sequence[str], arguments: dict[str, Any], seed: int) -> Result:
        """The texts after some prompts; `seed` serves arguments that ask for sampling."""
        from lm_eval.api.instance import Instance

        result = Result()
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
            result.answers[name] = self.stock.generate_until(asked, disable_tqdm=True)
            result.seconds[name] = now(device) - started
        result.tokens = sum(len(self.stock.tok_encode(p)) for p in prompts)
        return result


def load_scorer(subject: Subject) -> Scorer:
    """Load a subject's trunk and head, in the judged type. Raises ModelError, CheckpointError, GuardError."""
    if not subject.sliced:
        model = subject.load_whole()
        layers = model.config.get_text_config().num_hidden_layers
        return Scorer(subject, None, Slice(model, 0, layers, layers, subject.model.path, None), None)
    trunk = subject.model.load(0, subject.cut, with_lm_head=False) if subject.cut else None
    head = subject.model.load(subject.cut, None, with_lm_head=True)
    routers = None if subject.adapter is None else Routers(head, subject.adapter)
    return Scorer(subject, trunk, head, routers)


def load_writer(subject: Subject) -> Writer:
    """Load a subject whole, with its tokenizer and generation settings. Raises ModelError, CheckpointError, GuardError."""
    from transformers import GenerationConfig

    from roma_ray.engine.prepare import load_tokenizer

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
