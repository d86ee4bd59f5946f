"""Who is judged: a model, alone or with tuned routers, and how a worker loads it.

A model with MoE routers that roma-ray knows is loaded as slices, so that base and tuned share the trunk. Any other causal
language model of transformers, dense ones among them, is loaded whole and judged alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from roma_ray.config.schema import Config
from roma_ray.engine.model_spec import ModelSpec, set_threads
from roma_ray.engine.setup import resolve_model, resolve_path
from roma_ray.errors import CheckpointError, ConfigError, ModelError
from roma_ray.moe.exporting import read_routers
from roma_ray.store.artifacts import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Subject:
    """A judged model; small and picklable."""

    model: ModelSpec
    model_identity: str
    adapter: str | None
    """The exported routers: an adapter's folder or a router_ft.pt. None judges the base model alone."""
    adapter_identity: str | None
    layers: tuple[int, ...]
    """Tuned layers, whole-model indices."""
    sliced: bool
    """Whether roma-ray knows the model's routers; a dense model is run whole."""
    batch_tokens: int
    generation_batch: int
    keep_states: bool

    @property
    def cut(self) -> int:
        """First tuned layer: below it base and tuned are the same."""
        return self.layers[0] if self.layers else 0

    @property
    def names(self) -> tuple[str, ...]:
        """The judged models."""
        return ("base",) if self.adapter is None else ("base", "tuned")

    def identity(self) -> dict[str, Any]:
        """What decides the bits of an answer, for fingerprints."""
        named = {"model": self.model_identity, "adapter": self.adapter_identity}
        return {**named, **self.model.numeric_identity()}

    def plan_settings(self, kind: str) -> dict[str, int]:
        """The settings that decide how requests of a kind are batched."""
        if kind == "loglikelihood":
            return {"batch_tokens": self.batch_tokens}
        return {"generation_batch": self.generation_batch}

    def load_whole(self) -> PreTrainedModel:
        """The whole model as stock transformers loads it, in the judged type. Raises ModelError."""
        return self.model.load(0, None, with_lm_head=True).model if self.sliced else self._load_stock()

    def _load_stock(self) -> PreTrainedModel:
        import torch
        from transformers import AutoModelForCausalLM

        from roma_ray.moe.backbones import model_class_of
        from roma_ray.moe.fitting import refuse
        from roma_ray.moe.slices import loading_faults, quiet_loading
        from roma_ray.moe.snapshot import open_snapshot
        from roma_ray.moe.uneven import expert_counts

        spec = self.model
        dtype = getattr(torch, spec.dtype)
        set_threads(spec.threads)
        snapshot = open_snapshot(spec.path, spec.revision)
        source: dict[str, Any] = {"pretrained_model_name_or_path": spec.path, "revision": spec.revision}
        loader: Any = AutoModelForCausalLM
        # What transformers cannot read or build by itself.
        if snapshot.scheme is not None or expert_counts(self.config) is not None:
            lazy = snapshot.lazy_tensors(snapshot.tensors, dtype)
            source = {"pretrained_model_name_or_path": None, "config": self.config, "state_dict": lazy}
            loader = model_class_of(self.config, with_lm_head=True)
        try:
            with quiet_loading():
                model, info = loader.from_pretrained(
                    **source,
                    dtype=dtype,
                    device_map={"": spec.device},
                    attn_implementation=spec.attention,
                    use_safetensors=True,
                    trust_remote_code=False,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"{spec.path} cannot be loaded: {str(error).splitlines()[0]}") from None
        # Foreign tensors (another head, old buffers) are stock's own business; what it made up is not the model.
        refuse(loading_faults(info, "missing_keys", "mismatched_keys"), spec.path)
        loaded: PreTrainedModel = model.eval().requires_grad_(False)
        return loaded

    @cached_property
    def config(self) -> Any:
        """The transformers configuration of the model, or of its language model."""
        from roma_ray.moe.snapshot import open_snapshot

        return open_snapshot(self.model.path, self.model.revision).backbone()

    def skeleton(self) -> PreTrainedModel:
        """The model without weights, for code that only reads its configuration and class."""
        import torch

        from roma_ray.moe.backbones import model_class_of

        with torch.device("meta"):
            return model_class_of(self.config, with_lm_head=True)(self.config)


def resolve_subject(
    config: Config,
    *,
    adapter: str | None,
    device: str | None = None,
    measure: Callable[[ModelSpec], dict[str, Any]] | None = None,
) -> Subject:
    """The configured model, with the adapter's routers or alone; `device` and `measure` as for `engine.setup.resolve`.

    The adapter is judged in the type that it was exported in. Raises ModelError, CheckpointError, ConfigError.
    """
    from roma_ray.moe.families import family
    from roma_ray.moe.snapshot import open_snapshot

    spec, identity = resolve_model(config, device=device, measure=measure)
    judged = open_snapshot(spec.path, spec.revision).config()
    try:
        family(judged)
        sliced = True
    except ModelError:
        if adapter is not None:
            raise
        sliced = False
    settings = config.evaluation
    subject = Subject(
        model=spec,
        model_identity=identity,
        adapter=None,
        adapter_identity=None,
        layers=(),
        sliced=sliced,
        batch_tokens=settings.batch_tokens,
        generation_batch=settings.generation_batch,
        keep_states=settings.keep_states,
    )
    return subject if adapter is None else with_adapter(subject, adapter, judged.model_type, config.model.dtype)


def with_adapter(subject: Subject, adapter: str, model_type: str, wanted: str = "auto") -> Subject:
    """The subject with exported routers (an adapter or a router_ft.pt), in their type. Raises CheckpointError, ConfigError."""
    checkpoint = read_routers(resolve_path(adapter), base=subject.model.path, revision=subject.model.revision)
    if checkpoint.model_type != model_type:
        raise CheckpointError(
            f"{adapter} holds routers of a {checkpoint.model_type} model ({checkpoint.base_model}), but {subject.model.path} is a "
            f"{model_type} one"
        )
    if wanted not in ("auto", checkpoint.dtype):
        raise ConfigError(
            f"{adapter} was exported in {checkpoint.dtype}, and only that type is what others will load: leave model.dtype at "
            f"auto or set it to {checkpoint.dtype}, not {wanted}"
        )
    from roma_ray.moe.masters import tensor_digest

    digests = {key: tensor_digest(tensor) for key, tensor in sorted(checkpoint.tensors.items())}
    return replace(
        subject,
        model=replace(subject.model, dtype=checkpoint.dtype),
        adapter=resolve_path(adapter),
        adapter_identity=fingerprint(digests),
        layers=checkpoint.layers,
    )
