"""Whether stored tensors are those that a model needs, told by name from the files' headers before any memory is taken.

transformers fills what is missing with fresh values and builds what does not fit at the size that the configuration says:
the one gives another model without a word, the other takes any amount of memory.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from roma_ray.errors import ModelError

Shape = tuple[int, ...]
_EXPERT = re.compile(r"^(.*\.experts\.)(\d+)(\..+)$")
_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")
_SHOWN = 3


def skeleton_of(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model without weights. The configuration is left as it is."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


def check_fit(skeleton: PreTrainedModel, shapes: Mapping[str, Shape], where: str, *, first_layer: int = 0) -> None:
    """Refuse tensors that are not what the model needs: one missing, or of another shape. Raises ModelError, naming it.

    `shapes` holds what is there by the checkpoint's keys, with layers numbered as in the skeleton, whose layer 0 is the whole
    model's `first_layer`.
    """
    sources, merged = by_target(skeleton, shapes)
    tied = {**skeleton.all_tied_weights_keys, **{two: one for one, two in skeleton.all_tied_weights_keys.items()}}
    faults: list[str] = []
    for name, tensor in skeleton.state_dict().items():
        found, shape = sources.get(name, {}), tuple(tensor.shape)
        if not found:
            if tied.get(name) not in sources:
                faults.append(f"{_whole_name(skeleton, name)} is missing")
        elif name in merged:
            faults += _expert_faults(name, found, shape)
        else:
            faults += [f"{key} has shape {stored}, not {shape}" for key, stored in found.items() if stored != shape]
    refuse([_shifted(fault, first_layer) for fault in faults], where)


def refuse(faults: Sequence[str], where: str) -> None:
    """Raise ModelError when there are any faults, showing the first ones."""
    if faults:
        more = f", and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ModelError(
            f"the weights in {where} are not those that its config.json describes: {'; '.join(faults[:_SHOWN])}{more}. "
            "Nothing is made up for them: get the model's files again, all from the same place."
        )


def by_target(skeleton: PreTrainedModel, shapes: Mapping[str, Shape]) -> tuple[dict[str, dict[str, Shape]], set[str]]:
    """The checkpoint keys that make each tensor of the model, and which tensors are put together from several (experts)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(skeleton)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    needed = skeleton.state_dict()
    sources: dict[str, dict[str, Shape]] = {}
    merged: set[str] = set()
    for key, shape in shapes.items():
        name, pattern = rename_source_key(key, renamings, converters, skeleton.base_model_prefix, needed)
        sources.setdefault(name, {})[key] = shape
        if pattern is not None:
            merged.add(name)
    return sources, merged


def _expert_faults(name: str, found: Mapping[str, Shape], shape: Shape) -> list[str]:
    """What is wrong with the tensors, one an expert and projection, that make the model's tensor `name`, experts first."""
    projections: dict[tuple[str, str], dict[int, Shape]] = {}
    for key, stored in found.items():
        match = _EXPERT.match(key)
        if match is not None:
            projections.setdefault((match[1], match[3]), {})[int(match[2])] = stored
    faults: list[str] = []
    for (head, tail), experts in projections.items():
        usual = Counter(experts.values()).most_common(1)[0][0]
        faults += [f"{head}{n}{tail} is missing" for n in range(shape[0]) if n not in experts]
        faults += [f"{head}{n}{tail} is of an expert beyond the last, {shape[0] - 1}" for n in experts if n >= shape[0]]
        faults += [
            f"{head}{n}{tail} has shape {stored}, the other experts' is {usual}"
            for n, stored in experts.items()
            if stored != usual
        ]
    held = sum(math.prod(stored) for stored in found.values())
    if not faults and held != math.prod(shape):
        faults.append(f"the {len(found)} tensors of {name} hold {held:,} numbers, not {math.prod(shape):,}")
    return faults


def _whole_name(skeleton: PreTrainedModel, name: str) -> str:
    """A tensor's name in the whole causal language model."""
    whole = skeleton.get_output_embeddings() is not None
    return name if whole else f"{skeleton.base_model_prefix}.{name}"


def _shifted(fault: str, first_layer: int) -> str:
    return _LAYER.sub(lambda match: str(int(match[0]) + first_layer), fault, count=1)
