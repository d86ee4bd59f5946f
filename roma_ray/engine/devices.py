"""What kind of device computes: results on different kinds may differ in their last bits, so artifacts name theirs."""

from __future__ import annotations

import platform


def device_kind(device: str) -> str:
    """The kind of this process's `cuda` device ("NVIDIA H100 80GB HBM3", "AMD Instinct MI300X"), or of its CPU ("x86_64 AVX512")."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def mixed_devices(stage: str, kinds: list[str]) -> str | None:
    """The warning about a stage that more than one kind of device computed; None for one kind."""
    if len(kinds) < 2:
        return None
    return (
        f"{stage} was computed on {' and '.join(kinds)}: their sums differ in the last bits, so another run may differ; "
        "give ray.extract, ray.embed or ray.finetune an `accelerator` for runs that are to be repeated"
    )
