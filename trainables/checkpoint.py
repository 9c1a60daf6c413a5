"""Where a trial stands after an epoch: tensors as safetensors, the rest as JSON, nothing pickled.

The two newest epochs are kept. A checkpoint counts only if tensors and state match the checksum in its JSON file,
which is written last; a damaged one is passed over for the one before it, with a warning. Only one process writes to
a folder at a time, so what another left half written is removed.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from trainables.files import checksum, replacing, write_atomically

KEEP = 2


def save_checkpoint(
    folder: Path, epoch: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """Write ``epoch-NNNN.safetensors`` and ``.json`` and drop all but the newest ``KEEP``.

    Args:
        state: plain JSON-like data without NaN.

    Raises:
        ValueError: a number in ``state`` that is not finite; nothing is written then.
        OSError: no space; the earlier checkpoints are left as they were.
    """
    body = json.loads(json.dumps({**state, "epoch": epoch}, allow_nan=False))
    for left in folder.glob("epoch-*.partial"):
        left.unlink(missing_ok=True)  # of a process that died while writing
    path = folder / f"epoch-{epoch:04d}.json"
    try:
        with replacing(path.with_suffix(".safetensors")) as partial:  # written from where the tensors are
            save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, partial)
    except SafetensorError as error:
        raise OSError(f"{folder}: cannot hold {path.stem} ({error})") from error
    crc32 = _checksum(checksum(path.with_suffix(".safetensors")), body)
    write_atomically(path, json.dumps({"crc32": crc32, **body}) + "\n")
    for old in sorted(folder.glob("epoch-*.json"))[:-KEEP]:
        old.unlink(missing_ok=True)
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def learned_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state without the weights that training leaves alone: they come with the encoder."""
    frozen = _frozen(module)
    return {name: value for name, value in module.state_dict().items() if name not in frozen}


def load_learned(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put ``learned_state`` back, over the weights that the module was made with.

    Raises:
        ValueError: not the state of such a module.
    """
    try:
        missing, surplus = module.load_state_dict(state, strict=False)
    except RuntimeError as error:  # another shape
        raise ValueError(" ".join(str(error).split())) from error
    wrong = sorted({*surplus, *missing} - _frozen(module))
    if wrong:
        raise ValueError(f"{wrong[0]}: missing or surplus")


def _frozen(module: nn.Module) -> set[str]:
    return {name for name, weight in module.named_parameters() if not weight.requires_grad}


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of the newest sound checkpoint, or None; warns of each damaged one."""
    for path in sorted(folder.glob("epoch-*.json"), reverse=True):
        try:
            state = json.loads(path.read_bytes())
            data = path.with_suffix(".safetensors").read_bytes()
            if state.pop("crc32") != _checksum(zlib.crc32(data), state):
                raise ValueError("checksum differs")
            return load(data), state
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
            SafetensorError,
        ) as error:
            warnings.warn(f"{path.name}: damaged checkpoint passed over ({error})", stacklevel=2)
    return None


def _checksum(of_tensors: int, state: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(state).encode(), of_tensors)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, ``optimizer.<parameter>.<slot>``."""
    return {
        f"optimizer.{index}.{key}": value
        for index, slots in optimizer.state_dict()["state"].items()
        for key, value in slots.items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put ``pack_optimizer``'s tensors back; the groups' settings stay as the optimizer was built."""
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            slots.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
