"""Protobuf's encoding, as far as it takes to leave large tensors where they are in an ONNX file.

A message is a row of fields, each a tag (number and kind) and a value; the value of kind 2 is a length and that many
bytes, which is also how a message stands inside another.  So the bytes of a tensor can be skipped when a file is read,
and copied straight from memory when one is written; protobuf's own parser and writer hold several copies of them.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from onnx import StringStringEntryProto, TensorProto

LARGE = 2**16  # bytes from which on a tensor is left where it is
BYTES = 2  # the kind of strings, bytes and messages
FIXED = {1: 8, 5: 4}  # sizes of the kinds without a length
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9  # fields of ModelProto, GraphProto, TensorProto
ELSEWHERE = {13, 14}  # fields of TensorProto that say where its bytes are


def skeleton(file: Path) -> bytes:
    """The message in an ONNX file, with every large initializer an external tensor that lies in this same file.

    Raises:
        ValueError: the bytes are no row of fields.
    """
    with file.open("rb") as stream:
        if not file.stat().st_size or not file.name.isprintable():  # a name that is no text cannot be written down
            return stream.read()
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return b"".join(_model(content, file.name))


def _model(content: mmap.mmap, name: str) -> Iterator[bytes]:
    for number, kind, start, value, end in fields(content, 0, len(content)):
        if (number, kind) == (GRAPH, BYTES):
            graph = b"".join(_graph(content, value, end, name))
            yield header(GRAPH, len(graph)) + graph
        else:
            yield content[start:end]


def _graph(content: mmap.mmap, begin: int, stop: int, name: str) -> Iterator[bytes]:
    for number, kind, start, value, end in fields(content, begin, stop):
        if (number, kind) == (INITIALIZER, BYTES) and end - value > LARGE:
            tensor = _tensor(content, value, end, name)
            yield header(INITIALIZER, len(tensor)) + tensor
        else:
            yield content[start:end]


def _tensor(content: mmap.mmap, begin: int, stop: int, name: str) -> bytes:
    """A tensor without its bytes where they are plainly there; else as it is."""
    found = list(fields(content, begin, stop))
    raw = [(value, end) for number, kind, _, value, end in found if (number, kind) == (RAW_DATA, BYTES)]
    if len(raw) != 1 or any(number in ELSEWHERE for number, *_ in found):
        return content[begin:stop]
    kept = b"".join(content[start:end] for number, _, start, _, end in found if number != RAW_DATA)
    value, end = raw[0]
    place = {"location": name, "offset": str(value), "length": str(end - value)}
    entries = [StringStringEntryProto(key=key, value=text) for key, text in place.items()]
    return kept + TensorProto(data_location=TensorProto.EXTERNAL, external_data=entries).SerializeToString()


def fields(content: mmap.mmap | bytes, begin: int, stop: int) -> Iterator[tuple[int, int, int, int, int]]:
    """The fields of the message in content[begin:stop]: number, kind, and where field, value and end are.

    Raises:
        ValueError: a field of an unknown kind, or one that does not end before the message does.
    """
    at = begin
    while at < stop:
        tag, value = _number(content, at, stop)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            _, end = _number(content, value, stop)
        elif kind == BYTES:
            length, value = _number(content, value, stop)
            end = value + length
        elif kind in FIXED:
            end = value + FIXED[kind]
        else:
            raise ValueError(f"kind {kind} at byte {at}")
        if end > stop:
            raise ValueError(f"the field at byte {at} ends behind its message")
        yield number, kind, at, value, end
        at = end


def _number(content: mmap.mmap | bytes, at: int, stop: int) -> tuple[int, int]:
    """The number at a place, seven bits a byte, and the place behind it."""
    result, shift = 0, 0
    while at < stop and shift < 64:
        byte = content[at]
        result, at, shift = result | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return result, at
    raise ValueError(f"no number ends before byte {at}")


def header(number: int, length: int) -> bytes:
    """What stands before a value of `length` bytes: tag and length."""
    return _encoded(number << 3 | BYTES) + _encoded(length)


def _encoded(number: int) -> bytes:
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])
