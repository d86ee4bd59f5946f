"""Names of layers and of token positions, as the paper's ablations use them.

Layers: `F3` the first three MoE layers, `L5` the last five, `M4` four in the middle, `F2M3` and so on joined, `All`, or
explicit indices. Tokens: `First1` ... `First3`, `Mid2` (also `M2`), `Last1` ... over the prompt's tokens. The middle of n items
out of N starts at floor((N - n) / 2) for both.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from roma_ray.errors import ConfigError

ANSWER = "Answer"
"""The token rule that reads where an answer is predicted; `config/free_form.py` names it too."""
_LAYER_PART = re.compile(r"([FML])(\d+)")
_TOKEN_PART = re.compile(r"(First|Middle|Mid|Last|[FML])(\d+)")


def select_layers(spec: str | Sequence[int], moe_layers: Sequence[int]) -> tuple[int, ...]:
    """Return the whole-model indices, ascending, of the tuned layers that `spec` names among the model's MoE layers.

    Numbers count MoE layers only (dense layers have no router); explicit indices are whole-model layer indices. Raises
    ConfigError for an unknown name, more layers than there are, parts that overlap (`F9L9` of 16), a repeated index, or
    an index that is not an MoE layer.
    """
    available = tuple(sorted(moe_layers))
    if not available:
        raise ConfigError("the model has no MoE layer to tune")
    if not isinstance(spec, str):
        return _explicit(spec, available)
    if spec.lower() == "all":
        return available
    return tuple(available[index] for index in _select(spec, len(available)))


def check_names(layers: str | Sequence[int], tokens: str) -> None:
    """Refuse what is wrong for any model: unknown names, a part twice, an index twice or below 0. Raises ConfigError."""
    check_tokens(tokens)
    if isinstance(layers, str):
        kinds = [kind for kind, _ in _layer_parts(layers)] if layers.lower() != "all" else []
        if len(set(kinds)) != len(kinds):
            raise ConfigError(f"the parts of layers {layers!r} overlap: each of F, M and L may stand once")
    else:
        _explicit(layers, tuple(range(max(layers, default=0) + 1)))


def check_tokens(spec: str) -> None:
    """Refuse a token rule that is none: neither of the prompt's positions nor `Answer`. Raises ConfigError."""
    if spec != ANSWER:
        token_positions(spec, 1)


def token_positions(spec: str, prompt_length: int) -> tuple[int, ...]:
    """Return the positions, ascending, that `spec` names in a prompt of `prompt_length` real tokens (0 is the first).

    Only distinct positions that exist are given: a prompt shorter than a name asks for is used whole, and parts that meet
    in a short prompt (First1Last1 of one token) count a token once, because one short prompt must not end a run of
    thousands. Raises ConfigError for an unknown name, for one that has the same part twice, and for an empty prompt.
    """
    if prompt_length < 1:
        raise ConfigError("a prompt needs at least one token")
    if spec.lower() == "all":
        return tuple(range(prompt_length))
    parts = _parts(spec, _TOKEN_PART, "tokens", "First1, First3, Mid2, Last1, First1Last1 or All")
    kinds = [kind for kind, _ in parts]
    if len(set(kinds)) != len(kinds):
        raise ConfigError(f"the parts of tokens {spec!r} overlap: each of First, Mid and Last may stand once")
    chosen = {position for kind, count in parts for position in _range(kind, min(count, prompt_length), prompt_length)}
    return tuple(sorted(chosen))


def aligned_positions(spec: str, prompt_length: int, longest: int) -> tuple[int, ...]:
    """The same positions in places that correspond between prompts: -1 where this one has none.

    As many places for every prompt of a table whose longest has `longest` tokens: those that the name counts, First and Mid
    from their first, Last from the last token; All has `longest`, counted from the last token. Errors as `token_positions`.
    """
    existing = token_positions(spec, prompt_length)
    if spec.lower() == "all":
        return (*([-1] * (longest - prompt_length)), *existing)
    places: list[int] = []
    for kind, count in _parts(spec, _TOKEN_PART, "tokens", "First1, Mid2, Last1"):
        real = _range(kind, min(count, prompt_length), prompt_length)
        absent = [-1] * (count - len(real))
        for position in (*absent, *real) if kind == "L" else (*real, *absent):
            # Parts that meet in a short prompt count a token once.
            places.append(-1 if position in places else position)
    return tuple(places)


def _explicit(spec: Sequence[int], available: tuple[int, ...]) -> tuple[int, ...]:
    indices = list(spec)
    if not indices:
        raise ConfigError("no layers are chosen: give at least one index, or a name such as L5")
    if len(set(indices)) != len(indices):
        raise ConfigError(f"layers {indices} name a layer twice")
    foreign = sorted(set(indices) - set(available))
    if foreign:
        raise ConfigError(f"layers {foreign} are not MoE layers of this model; its MoE layers are {list(available)}")
    return tuple(sorted(indices))


def _parts(spec: str, pattern: re.Pattern[str], what: str, forms: str) -> list[tuple[str, int]]:
    parts = [(match[1][0], int(match[2])) for match in pattern.finditer(spec)]
    if not parts or pattern.sub("", spec) or any(count == 0 for _, count in parts):
        raise ConfigError(f"{what} {spec!r} is not a name I know. Use {forms}.")
    return parts


def _layer_parts(spec: str) -> list[tuple[str, int]]:
    return _parts(spec, _LAYER_PART, "layers", "F3, L5, M4, F2M3, F2L2, All, or explicit indices")


def _range(kind: str, count: int, total: int) -> range:
    start = {"F": 0, "M": (total - count) // 2, "L": total - count}[kind]
    return range(start, start + count)


def _select(spec: str, total: int) -> tuple[int, ...]:
    chosen: list[int] = []
    for kind, count in _layer_parts(spec):
        if count > total:
            raise ConfigError(f"layers {spec!r} asks for {count} layers, but the model has {total} MoE layers")
        chosen.extend(_range(kind, count, total))
    if len(set(chosen)) != len(chosen):
        raise ConfigError(f"the parts of layers {spec!r} overlap: the model has {total} MoE layers")
    return tuple(sorted(chosen))
