"""Reading a GGUF file: its metadata, its table of tensors, and the bytes behind each.

The format (little endian): magic ``GGUF``, version, number of tensors, number of metadata entries; the entries (name,
type, value); per tensor its name, shape (fastest axis first), type and offset; padding; the data. Everything read is
held against the size of the file, so that a truncated or damaged file is named as such instead of giving wrong
weights.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from setpoint.errors import InputError
from setpoint.extras import require

_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING, _ARRAY = 8, 9
_UINT32, _UINT64 = _SCALARS[4], _SCALARS[10]
_MAX_DIMENSIONS = 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies in the file.

    Args:
        name: As written in the file.
        shape: Slowest axis first, as torch counts (the file has them the other way round).
        kind: Name of the storage type ("F32", "Q4_1").
        start: First byte in the file.
        size: Number of bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """A GGUF file whose header has been read and found to fit the file.

    Args:
        path: The file.
        metadata: Every entry, by name.
        tensors: Every tensor's place, by name, in file order.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, path: Path) -> GGUFFile:
        """Read the header.

        Args:
            path: A GGUF file, version 2 or 3.

        Returns:
            Metadata and the table of tensors; the data stays on disk.

        Raises:
            InputError: The file is not GGUF, is damaged, or ends too early.
        """
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                magic = file.read(4)
                if magic != b"GGUF":
                    raise InputError(f"{path} is not a GGUF file: it starts with {magic!r} instead of b'GGUF'")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                    return _Parser(path, view, size).parse()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error

    @property
    def architecture(self) -> str:
        """The family the file names ("llama")."""
        return str(self.need("general.architecture"))

    def need(self, key: str) -> Any:
        """A metadata entry that must be there.

        Raises:
            InputError: It is not.
        """
        if key not in self.metadata:
            raise InputError(f"{self.path} lacks the metadata entry {key!r} that its model needs")
        return self.metadata[key]

    def tensor(self, name: str) -> Tensor:
        """One tensor, dequantized to float32.

        Args:
            name: As in the file.

        Returns:
            A float32 tensor of the file's shape.
        """
        quants = require("gguf.quants", "hf", "to read GGUF files")
        kinds = require("gguf.constants", "hf", "to read GGUF files").GGMLQuantizationType
        info = self.tensors[name]
        raw = np.fromfile(self.path, dtype=np.uint8, count=info.size, offset=info.start)
        kind = kinds[info.kind]
        if info.kind in ("F32", "F16"):
            values = raw.view({"F32": np.float32, "F16": np.float16}[info.kind]).astype(np.float32, copy=False)
        else:
            rows = prod(info.shape[:-1])
            values = quants.dequantize(raw.reshape(rows, -1), kind)
        return torch.from_numpy(values).reshape(info.shape)


class _Parser:
    """Walks the header; every step is checked against the end of the file."""

    def __init__(self, path: Path, view: mmap.mmap, size: int) -> None:
        self.path, self.view, self.size, self.at = path, view, size, 4

    def parse(self) -> GGUFFile:
        try:
            return self.header()
        except RecursionError as error:
            raise self.damaged("its metadata is nested without end") from error

    def header(self) -> GGUFFile:
        version = self.scalar(_UINT32)
        if version not in (2, 3):
            raise InputError(f"{self.path} is GGUF version {version}; versions 2 and 3 (little endian) can be read")
        tensor_count, entry_count = self.scalar(_UINT64), self.scalar(_UINT64)
        metadata = {}
        for _ in range(entry_count):
            key = self.string()
            metadata[key] = self.value(self.scalar(_UINT32))
        table = [self.tensor_entry() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self.damaged(f"its alignment is {alignment!r}")
        base = -(-self.at // alignment) * alignment
        tensors = (self.place(name, shape, kind, base + offset) for name, shape, kind, offset in table)
        return GGUFFile(self.path, metadata, {tensor.name: tensor for tensor in tensors})

    def tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        dimensions = self.scalar(_UINT32)
        if dimensions > _MAX_DIMENSIONS:
            raise self.damaged(f"tensor {name!r} would have {dimensions} dimensions")
        shape = tuple(self.scalar(_UINT64) for _ in range(dimensions))[::-1]
        return name, shape, self.scalar(_UINT32), self.scalar(_UINT64)

    def place(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> TensorInfo:
        constants = require("gguf.constants", "hf", "to read GGUF files")
        try:
            kind_name = constants.GGMLQuantizationType(kind).name
        except ValueError as error:
            raise self.damaged(f"tensor {name!r} has the unknown type {kind}") from error
        block, block_bytes = constants.GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise self.damaged(f"tensor {name!r} of shape {shape} cannot be stored as {kind_name} (groups of {block})")
        size = prod(shape) // block * block_bytes
        if start + size > self.size:
            raise InputError(
                f"{self.path} is truncated: tensor {name!r} ends at byte {start + size:,}, the file at {self.size:,}"
            )
        return TensorInfo(name, shape, kind_name, start, size)

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.scalar(_UINT32), self.scalar(_UINT64)
            if item in _SCALARS:
                code = _SCALARS[item]
                raw = self.take(count * code.size)
                return [number for (number,) in code.iter_unpack(raw)]
            return [self.value(item) for _ in range(count)]
        if kind not in _SCALARS:
            raise self.damaged(f"unknown value type {kind} at byte {self.at:,}")
        return self.scalar(_SCALARS[kind])

    def scalar(self, code: struct.Struct) -> Any:
        return code.unpack(self.take(code.size))[0]

    def string(self) -> str:
        raw = self.take(self.scalar(_UINT64))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"text at byte {self.at - len(raw):,} is not UTF-8") from error

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > self.size:
            raise InputError(
                f"{self.path} is truncated or damaged: its header asks for byte {end:,}, the file has {self.size:,}"
            )
        raw = self.view[self.at : end]
        self.at = end
        return raw

    def damaged(self, what: str) -> InputError:
        return InputError(f"{self.path} is damaged: {what}")
