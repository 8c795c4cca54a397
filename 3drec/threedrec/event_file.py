"""Files that TensorBoard reads: records of scalars, as TensorFlow writes them, without either being imported.

A record is its length (uint64), a checksum of the length, its bytes, and a checksum of those; the bytes are a message
``Event`` of tensorflow/core/util/event.proto in the encoding of Protocol Buffers.
"""

import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path

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


class EventFile:
    """A file ``events.out.tfevents.…`` in a folder, made when it is opened."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"events.out.tfevents.{int(time.time())}.{os.getpid()}").open("wb")
        self._write(_double(1, time.time()) + _bytes(3, b"brain.Event:2"))

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Append the values of one step, by name."""
        parts = (_bytes(1, _bytes(1, name.encode()) + _float(2, value)) for name, value in values.items())
        self._write(_double(1, time.time()) + _varint(2 << 3) + _varint(step) + _bytes(5, b"".join(parts)))

    def flush(self) -> None:
        """Hand over to the system what was added."""
        self._file.flush()

    def close(self) -> None:
        """Write what is left, and close the file."""
        self._file.close()

    def _write(self, event: bytes) -> None:
        length = struct.pack("<Q", len(event))
        checks = (struct.pack("<I", masked_crc(part)) for part in (length, event))
        self._file.write(length + next(checks) + event + next(checks))


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
