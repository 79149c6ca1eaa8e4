"""Reads `pytorch_model.bin` files. No other module that loads models imports torch."""

import os
import zipfile
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np

from lvlm_jax.errors import LVLMError

_IS_FOLDER = 0x10  # attribute of a zip record; torch would leave the memory of such a tensor uninitialised


class BinFile:
    """An open `.bin` file, with the interface of `SafetensorsFile`.

    Only tensors are unpickled (`weights_only=True`): a file with code is refused.

    Raises:
        LVLMError: torch is not installed, or the file is missing, broken, or contains anything but tensors.
    """

    def __init__(self, path: str | os.PathLike):
        try:
            import torch
        except ImportError as error:
            raise LVLMError(
                f"{path} can only be read with torch, which is not installed: `pip install torch`, "
                "or use a checkpoint with .safetensors files"
            ) from error
        self.path = Path(path)
        if self.path.exists() and not self.path.is_file():
            raise LVLMError(f"cannot read {self.path}: it is not a file")
        try:
            try:
                state_dict = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format before torch 1.6 cannot be mapped
                state_dict = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch may raise anything while unpickling
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise LVLMError(f"cannot read {self.path} as a torch file of tensors: {reason[0]}") from error
        if not isinstance(state_dict, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state_dict.items()
        ):
            raise LVLMError(f"{self.path} is not a state dict: expected a dict of tensors")
        _check_records(self.path, state_dict)
        self._arrays = {}
        for name, tensor in state_dict.items():
            try:
                self._arrays[name] = _to_numpy(torch, tensor)
            except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
                raise LVLMError(
                    f"{self.path}: tensor {name[:80]} is of a kind that cannot be read ({_kind(torch, tensor)}); "
                    "expected dense numbers"
                ) from error
        self.shapes = {name: array.shape for name, array in self._arrays.items()}
        self.dtypes = {name: array.dtype for name, array in self._arrays.items()}

    def view(self, name: str) -> np.ndarray:
        """The tensor as a view of the file."""
        return self._arrays[name]

    def release(self, name: str) -> None:
        """Releases a tensor that is not needed again."""
        self._arrays.pop(name, None)


def _check_records(path: Path, state_dict: dict) -> None:
    """Refuses a file whose records have other sizes than its tensors: a mapped tensor would then overlap others.

    Raises:
        LVLMError: the file is damaged.
    """
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            records = [record for record in archive.infolist() if "/data/" in record.filename]
            for record in records:
                archive.open(record).close()  # checks the header before the record, which a map does not
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise LVLMError(f"cannot read {path}: {error}; copy the file again") from error
    if any(record.external_attr & _IS_FOLDER for record in records):
        raise LVLMError(f"cannot read {path}: a record of a tensor is marked as a folder; copy the file again")
    unmatched = Counter(record.file_size for record in records)
    strided = [tensor.untyped_storage() for tensor in state_dict.values() if str(tensor.layout) == "torch.strided"]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in strided if storage.device.type == "cpu"}
    for size in sizes.values():
        unmatched[size] -= 1
        if size and unmatched[size] < 0:
            raise LVLMError(f"cannot read {path}: it has no record of {size} bytes for a tensor; copy the file again")


def _to_numpy(torch, tensor) -> np.ndarray:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise TypeError
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # NumPy itself has no bfloat16
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    if str(tensor.dtype).startswith("torch.float8_"):
        return tensor.view(torch.uint8).numpy().view(getattr(ml_dtypes, str(tensor.dtype).removeprefix("torch.")))
    return tensor.numpy()


def _kind(torch, tensor) -> str:
    words = [str(tensor.dtype).removeprefix("torch.")]
    if tensor.layout != torch.strided:
        words.append(str(tensor.layout).removeprefix("torch."))
    if tensor.device.type != "cpu":
        words.append(f"on the device {tensor.device.type}")
    return ", ".join(words)
