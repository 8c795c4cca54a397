"""Files that TensorBoard reads: records of scalars, as TensorFlow writes them, without either being imported.

A record is its length (uint64), a checksum of the length, its bytes, and a checksum of those; the bytes are a message
``Event`` of tensorflow/core/util/event.proto in the encoding of Protocol Buffers.
"""

import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

_POLYNOMIAL = 0x82F63B78
"""Of CRC-32C (Castagnoli), bits reversed."""


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


_CRC = _crc_table()


def masked_crc(data: bytes) -> int:
    """Return the checksum of a record: CRC-32C, rotated and shifted so that a checksum of checksums stays sound."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


class EventLog:
    """A file ``events.out.tfevents.…`` in a folder, made with the first values."""

    def __init__(self, folder: Path) -> None:
        """Write into ``folder``."""
        self.folder = folder
        self._file: BinaryIO | None = None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take in the values of a step, by name."""
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = (self.folder / f"events.out.tfevents.{int(time.time())}.{os.getpid()}").open("wb")
            self._file.write(_record(_double(1, time.time()) + _bytes(3, b"brain.Event:2")))
        parts = (_bytes(1, _bytes(1, name.encode()) + _float(2, value)) for name, value in values.items())
        event = _double(1, time.time()) + _varint(2 << 3) + _varint(step) + _bytes(5, b"".join(parts))
        self._file.write(_record(event))

    def flush(self) -> None:
        """Write what was taken in."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Write what was taken in, and end."""
        if self._file is not None:
            self._file.close()


def _record(event: bytes) -> bytes:
    length = struct.pack("<Q", len(event))
    checks = (struct.pack("<I", masked_crc(part)) for part in (length, event))
    return length + next(checks) + event + next(checks)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _bytes(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _double(field: int, value: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", value)


def _float(field: int, value: float) -> bytes:
    # Beyond float32 there is only infinity.
    kept = value if abs(value) < 3.4e38 or value != value else float("inf") * (1 if value > 0 else -1)
    return _varint(field << 3 | 5) + struct.pack("<f", kept)
