"""A process of its own in which ONNX Runtime runs models for `runs`: what crashes or hangs here harms nobody.

Started by path, so that nothing of tamis (nor torch) is imported.  Reads pickled (model, arrays) from its standard
input, each behind its length, and answers with pickled (arrays, "") or (None, reason).
"""

from __future__ import annotations

import os
import pickle
import struct
import sys
from typing import Any, BinaryIO

HEADER = struct.Struct("<Q")


def receive(stream: BinaryIO) -> Any:
    """One message; raises EOFError when the other side is gone."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        raise EOFError
    (length,) = HEADER.unpack(header)
    content = stream.read(length)
    if len(content) < length:
        raise EOFError
    return pickle.loads(content)


def send(stream: BinaryIO, message: Any) -> None:
    """One message."""
    content = pickle.dumps(message, protocol=5)
    stream.write(HEADER.pack(len(content)) + content)
    stream.flush()


def main() -> None:
    """Serve until the input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    loaded: tuple[bytes, Any] | None = None
    while True:
        try:
            model, arrays = receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            if loaded is None or loaded[0] != model:
                loaded = model, onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            session = loaded[1]
            names = [one.name for one in session.get_inputs()]
            send(answers, (session.run(None, dict(zip(names, arrays, strict=True))), ""))
        except Exception as error:
            send(answers, (None, str(error)))


if __name__ == "__main__":
    main()
