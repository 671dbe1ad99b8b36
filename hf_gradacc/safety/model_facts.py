"""What of a model has to be the same on all ranks, and before and after a resume."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradacc.safety.identity import digest_of

__all__ = ["describe_layout", "sample_values"]

_VALUES_PER_TENSOR = 64


def describe_layout(model: nn.Module) -> dict[str, Any]:
    """Describe a model by names, shapes, types, and what is trained of it, as JSON values.

    Returns:
        "layout": digest of all names and shapes. "trained": digest of the names that are trained.
        "dtype": the type of those. "frozen": digest of some values of the others, None if they
        cannot be read here. "config" and "adapter": their numbers and words, to name what differs.
    """
    named = [(_plain_name(name), p) for name, p in model.named_parameters()]
    trained = [(name, p) for name, p in named if p.requires_grad]
    frozen = [p for _, p in named if not p.requires_grad]
    config: Any = getattr(model, "config", None)
    adapter: Any = next(iter(getattr(model, "peft_config", {}).values()), None)
    kind = getattr(adapter, "peft_type", None)
    return {
        "class": type(model).__name__,
        "name": getattr(config, "_name_or_path", None),
        "layout": digest_of([(name, _shape(p)) for name, p in named]),
        "trained": digest_of([name for name, _ in trained]),
        "num_parameters": sum(_numel(p) for _, p in named),
        "num_trained": len(trained),
        "dtype": str(trained[0][1].dtype).removeprefix("torch.") if trained else None,
        "frozen": sample_values(frozen) if frozen else None,
        "config": _scalars(config.to_dict()) if hasattr(config, "to_dict") else {},
        "adapter_kind": str(getattr(kind, "value", kind)) if adapter is not None else None,
        "adapter": _scalars(adapter.to_dict()) if hasattr(adapter, "to_dict") else {},
    }


def sample_values(parameters: Iterable[Tensor]) -> str | None:
    """Hash up to 64 evenly spaced values of each tensor; one wait for the device in all.

    Returns:
        The hash; None if values are elsewhere (sharded, on torch's meta device) or quantized.
    """
    values = []
    for parameter in parameters:
        whole = getattr(parameter, "ds_shape", parameter.shape) == parameter.shape
        local = type(parameter.data) is Tensor and not parameter.is_meta
        if not (whole and local and parameter.is_floating_point()):
            return None
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // _VALUES_PER_TENSOR)
        values.append(flat[::step][:_VALUES_PER_TENSOR].double())
    if not values:
        return None
    on_host = torch.cat([value.to(values[0].device) for value in values]).cpu()
    return hashlib.blake2b(on_host.numpy().tobytes(), digest_size=8).hexdigest()


def _plain_name(name: str) -> str:
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _shape(parameter: Tensor) -> list[int]:
    return [int(size) for size in getattr(parameter, "ds_shape", parameter.shape)]


def _numel(parameter: Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _scalars(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what a difference can be named by, of dictionaries inside too (rotary embeddings)."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inside = value if isinstance(value, Mapping) else {}
        flat |= {str(key): value} if not inside else {f"{key}.{k}": v for k, v in inside.items()}
    return {
        key: value
        for key, value in flat.items()
        if isinstance(value, (bool, int, float, str))
        and not key.startswith("_")
        and key not in ("dtype", "inference_mode", "torch_dtype", "transformers_version")
    }
