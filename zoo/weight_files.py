"""Weights on disk: ``.safetensors`` files, which hold tensors and nothing that could run."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from edgekit.errors import InputError, TrainingError

__all__ = ["load_weights", "save_weights"]


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a ``.safetensors`` file into a model, every tensor of both and nothing else.

    A tensor that the model has under several names is in the file under one of them at least.

    Raises:
        InputError: the file cannot be read, or its tensors are not the model's; the message names the first.
    """
    try:
        with safe_open(path, framework="pt") as file:
            given = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable .safetensors file ({error})") from error
    expected = model.state_dict()
    same = _first_names(expected)
    held = {same[name] for name in given if name in same}
    missing = [name for name in expected if same[name] not in held]
    unknown = [name for name in given if name not in expected]
    if missing:
        raise InputError(f"{path}: lacks '{missing[0]}', which the model has ({len(missing)} of {len(expected)} lack)")
    if unknown:
        raise InputError(f"{path}: holds '{unknown[0]}', which the model has not ({len(unknown)} in all)")
    for name, tensor in given.items():
        if tensor.shape != expected[name].shape:
            raise InputError(
                f"{path}: '{name}' has shape {tuple(tensor.shape)}, in the model it has {tuple(expected[name].shape)}"
            )
    # Not strict: the other names of a shared tensor lack.
    model.load_state_dict(given, strict=False)


def save_weights(model: nn.Module, path: Path, *, metadata: dict[str, object]) -> None:
    """Write a model's tensors as ``.safetensors``, aside and renamed, with ``metadata`` as JSON under ``edgekit``.

    One key, since safetensors keeps several in no fixed order, and equal trainings must give equal files. A tensor
    that the model has under several names (a module registered twice) is written once, under the first.

    Raises:
        TrainingError: it cannot be written.
    """
    aside = path.with_name(f".{path.name}.part")
    state = model.state_dict()
    same = _first_names(state)
    state = {name: tensor.contiguous() for name, tensor in state.items() if same[name] == name}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, aside, metadata={"edgekit": json.dumps(metadata)})
        aside.chmod(0o644)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path}: cannot be written ({error})") from error
    finally:
        aside.unlink(missing_ok=True)


def _first_names(state: dict[str, Tensor]) -> dict[str, str]:
    """For every name the first that holds the same tensor: its own, but in a model that shares weights."""
    first: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    return {
        name: first.setdefault((tensor.data_ptr(), tuple(tensor.shape), tensor.stride()), name)
        for name, tensor in state.items()
    }
