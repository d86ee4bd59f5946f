"""What a run resolves once: where the model is, which it is, its layers, its numeric settings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from roma_ray.config.schema import Config, ModelConfig
from roma_ray.engine.model_spec import ModelSpec, model_facts_of
from roma_ray.errors import ConfigError, ModelError
from roma_ray.store.artifacts import CONFIG, Stage, Store, file_digest, fingerprint, write_text
from roma_ray.store.buckets import SCHEMES, as_path
from roma_ray.store.files import exists, local_place, read_text

# Larger safetensors files are hashed by header, small tensors and samples of large ones.
_WHOLE_DIGEST_BYTES = 256 << 20
# Routers are far smaller (OLMoE's: 256 KiB), experts' fused weights far larger.
_WHOLE_TENSOR_BYTES = 8 << 20
_SAMPLE = 1 << 16


@dataclass(frozen=True)
class Setup:
    """A configuration with all that depends on the model and the machine filled in."""

    config: Config
    store: Store
    model: ModelSpec
    model_identity: str
    num_layers: int
    moe_layers: tuple[int, ...]
    layers: tuple[int, ...]
    """Tuned layers, whole-model indices."""
    hidden_size: int
    cuts: tuple[int, ...]
    """Layers after whose attention the extraction keeps the states: this run's cut, or those of all trials of a grid."""
    token_rules: tuple[str, ...]
    """Token rules whose routing the extraction keeps: this run's, or those of all trials of a grid."""

    @property
    def cut(self) -> int:
        """The first tuned layer. All that lies below its experts is a constant function of the prompt."""
        return self.layers[0]

    def shared(self, cuts: Iterable[int], token_rules: Iterable[str]) -> Setup:
        """The same run on an extraction that also serves others: with these cuts and token rules besides its own."""
        return dataclasses.replace(
            self,
            cuts=tuple(sorted({self.cut, *cuts})),
            token_rules=tuple(sorted({self.config.routing.tokens, *token_rules})),
        )

    @property
    def layer_columns(self) -> list[int]:
        """Where the tuned layers lie among the MoE layers of the extracted routing."""
        return [self.moe_layers.index(layer) for layer in self.layers]

    def numeric_identity(self) -> dict[str, Any]:
        """The settings that decide the bits of a forward pass, for fingerprints."""
        return {"model": self.model_identity, **self.model.numeric_identity()}


def resolve(
    config: Config, *, device: str | None = None, measure: Callable[[ModelSpec], dict[str, Any]] | None = None
) -> Setup:
    """Fill in what the configuration leaves to the model and the machine.

    `device` overrides `auto` (the caller may know of GPUs on other machines), `measure` finds the fastest experts backend on
    a GPU (default: in this process). Raises ModelError, ConfigError, StorageError.
    """
    from roma_ray.moe.layers import check_tokens, select_layers

    check_tokens(config.routing.tokens)  # refuses an unknown name before any work
    store = Store(config.storage, config.reuse)
    spec, identity = resolve_model(config, device=device, measure=measure)
    facts = model_facts_of(spec.path, spec.revision)
    layers = select_layers(config.routing.layers, facts["moe_layers"])
    return Setup(
        config,
        store,
        spec,
        identity,
        facts["num_layers"],
        tuple(facts["moe_layers"]),
        layers,
        facts["hidden_size"],
        cuts=(layers[0],),
        token_rules=(config.routing.tokens,),
    )


def resolve_model(
    config: Config, *, device: str | None = None, measure: Callable[[ModelSpec], dict[str, Any]] | None = None
) -> tuple[ModelSpec, str]:
    """The configured model, whether or not it has routers, as every worker will load it, and its identity.

    The one place that decides it, for training and judging alike. Arguments and errors as `resolve`.
    """
    path = resolve_path(config.model.path)
    stored = _stored(path, config.model.revision)
    chosen = resolve_device(config) if device is None else device
    dtype = stored.dtype if config.model.dtype == "auto" else config.model.dtype
    # A hub's branch moves; the commit that this run found is part of every fingerprint, and what its workers load.
    revision = stored.commit or config.model.revision
    identity = model_identity(config.model.model_copy(update={"revision": revision}), path)
    backend = config.model.experts_backend
    # On a CPU a fixed one: what is fastest there depends on the load, and the bits must not.
    fixed = "eager" if backend == "auto" else backend
    spec = ModelSpec(path, revision, dtype, fixed, config.model.attention, chosen, config.threads)
    if stored.routed and backend == "auto" and chosen == "cuda":
        from roma_ray.engine.expert_backends import kept_backend, measure_backends

        kept = kept_backend(Store(config.storage), identity, spec, measure or measure_backends)
        spec = dataclasses.replace(spec, experts_backend=kept)
    if stored.routed:
        from roma_ray.engine.kept_selfchecks import checks_folder

        place = Store(config.storage).root / checks_folder({"model": identity, **spec.numeric_identity()})
        spec = dataclasses.replace(spec, checks=str(place))
    return spec, identity


def save_config(stage: Stage, config: Config) -> None:
    """Keep the resolved configuration beside a run's last stage, for commands that take --config. Raises StorageError."""
    path, resolved = stage.path / CONFIG, config.to_yaml()
    if not exists(path) or read_text(path) != resolved:
        write_text(path, resolved)


def resolve_device(config: Config) -> str:
    """`cpu` or `cuda` on this machine. Raises ModelError when a GPU is asked for and there is none."""
    import torch

    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ModelError(
            "device: cuda, but torch sees no GPU here. Install a torch built for your GPU (CUDA or ROCm), or use device: cpu."
        )
    return "cuda" if config.device != "cpu" and available else "cpu"


def resolve_path(path: str) -> str:
    """A model or file path with `assets:` names replaced by their place in the package; local folders made absolute.

    What lies in a bucket keeps its address, for each node makes a copy of its own. Raises StorageError for one that is none,
    ConfigError for a path that the system does not take: too long, of an unknown user's home, or not to be looked at.
    """
    if path.startswith("assets:"):
        return str(Path(__file__).parents[1] / "assets" / path.removeprefix("assets:"))
    if path.partition("://")[0] in SCHEMES:
        return str(as_path(path))
    try:
        expanded = Path(path).expanduser()
        return str(expanded.absolute()) if expanded.exists() else path
    except (OSError, RuntimeError, ValueError) as error:
        shown = path if len(path) <= 100 else f"{path[:100]}..."
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"the path {shown} cannot be looked up ({why}): give another, or make it readable") from None


def model_identity(model: ModelConfig, path: str) -> str:
    """What tells this model from another: the hub id and revision, or a digest of the local folder's content."""
    folder = local_place(path)
    if not folder.is_dir():
        return f"{path}@{model.revision or 'main'}"
    from roma_ray.moe.folders import refuse_special_files

    refuse_special_files(folder, ModelError)
    files = sorted(p for p in folder.iterdir() if p.suffix in {".json", ".safetensors", ".model", ".txt", ".jinja"})
    if not any(p.suffix == ".safetensors" for p in files):
        raise ModelError(f"{path} holds no .safetensors weights; only safetensors checkpoints are read")
    return fingerprint({p.name: _content_digest(p) for p in files})


def _content_digest(path: Path) -> str:
    """SHA-256 of a file's bytes; of a large safetensors file: its header, every small tensor whole, large ones by samples.

    Routers are small, so two checkpoints that differ in one gate always differ here.
    """
    if path.suffix != ".safetensors" or path.stat().st_size <= _WHOLE_DIGEST_BYTES:
        return file_digest(path)
    with open(path, "rb") as stream:
        length = stream.read(8)
        header = stream.read(int.from_bytes(length, "little"))
        digest = hashlib.sha256(length + header)
        try:
            spans = [fact["data_offsets"] for name, fact in json.loads(header).items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(f"{path} is not a safetensors file") from None
        first = 8 + len(header)
        for start, stop in sorted(spans):
            size = stop - start
            samples = (
                [(0, size)]
                if size <= _WHOLE_TENSOR_BYTES
                else [(0, _SAMPLE), (size // 2, _SAMPLE), (size - _SAMPLE, _SAMPLE)]
            )
            for offset, count in samples:
                stream.seek(first + start + offset)
                digest.update(stream.read(count))
    return digest.hexdigest()


@dataclass(frozen=True)
class _Stored:
    """What a model's files say of it, with or without routers."""

    commit: str | None
    """Of a hub model."""
    dtype: str
    routed: bool


@lru_cache(maxsize=8)
def _stored(path: str, revision: str | None) -> _Stored:
    import torch

    from roma_ray.moe.families import has_family
    from roma_ray.moe.snapshot import open_snapshot

    snapshot = open_snapshot(path, revision)
    config = snapshot.backbone()
    dtype = str(getattr(config, "dtype", None) or torch.float32).removeprefix("torch.")
    return _Stored(snapshot.revision, dtype, has_family(snapshot.config()))
