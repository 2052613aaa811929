"""Trained tensors that a method brings along: a scorer, a learned metric."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from .error_text import first_line
from .errors import BadParameter
from .rewrite import Pass
from .weight_errors import WeightsMismatch, WeightsUnreadable

if TYPE_CHECKING:
    from torch import Tensor

HANDED_OVER = "tensors@"  # what a pass shows instead of a path
PLAIN = set(",+[](){}'\"")  # characters that the text form of passes reads as its own
Shape = tuple[int | None, ...]  # None: any size


@dataclass(frozen=True)
class Weights:
    """Named tensors of a trained method.  Two are equal when they are from one path and hold the same.

    path     the file they were read from; "" for tensors handed over in Python
    digest   sha256 of all names, dtypes, shapes and bytes; the file's header does not count
    tensors  by name; floats are float32, whatever they are stored as
    """

    path: str
    digest: str
    tensors: dict[str, Tensor] = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.path or f"{HANDED_OVER}{self.digest[:12]}"

    @staticmethod
    def of(value: Any, where: str) -> Weights:
        """From a path, a mapping of tensors, or weights as they are.

        Raises:
            BadParameter: nothing was given, or the path has characters that no text form of a pass can hold.
            WeightsUnreadable: there is no such file, it is no safetensors file, or tensors were handed over in the run
                that a recipe speaks of.
        """
        if isinstance(value, Weights):
            return value
        if isinstance(value, Mapping):
            return Weights._made("", {str(name): _tensor(name, tensor, where) for name, tensor in value.items()})
        if not isinstance(value, str | os.PathLike):
            hint = "this method has trained parts: weights=FILE.safetensors, or in Python a dict of tensors."
            raise BadParameter(where=where, name="weights", rule="given", got=repr(value), hint=hint)
        path = os.fspath(value)
        if PLAIN & set(path):
            hint = "rename the file, or hand the tensors over as a dict."
            raise BadParameter(
                where=where,
                name="weights",
                rule="a path without brackets, quotes, commas and plus signs",
                got=path,
                hint=hint,
            )
        return Weights._made(path, _read(path, where))

    @staticmethod
    def _made(path: str, tensors: dict[str, Tensor]) -> Weights:
        widened = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
        digest = hashlib.sha256()
        for name, value in sorted(widened.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.contiguous().numpy().tobytes())
        return Weights(path, digest.hexdigest(), widened)

    def check(self, expected: Mapping[str, Shape], where: str, layers: Sequence[int], width: int) -> None:
        """Raise WeightsMismatch unless these are the tensors `expected`, no more and no less."""
        missing = [name for name in expected if name not in self.tensors]
        surplus = [name for name in self.tensors if name not in expected]
        odd = [
            f"{name} is {_shown(value.shape)}, not {_shown(expected[name])}"
            for name, value in self.tensors.items()
            if name in expected and not _fits(tuple(value.shape), expected[name])
        ]
        odd += [f"{name} holds {value.dtype}" for name, value in self.tensors.items() if not value.is_floating_point()]
        said = [
            f"{_listed(names)} {what}" for names, what in ((missing, "missing"), (surplus, "not asked for")) if names
        ]
        said += [_listed(odd)] if odd else []
        if said:
            wanted = _listed([f"{name} {_shown(shape)}" for name, shape in expected.items()])
            fields = {"reason": "; ".join(said), "expected": wanted, "width": width, "layers": list(layers)}
            raise WeightsMismatch(where=where, path=str(self), **fields)


@dataclass(frozen=True)
class TrainedPass(Pass):
    """A pass with trained parts; stands first among its bases.

    Its tensors become buffers of the rewritten program, named `tamis.PASS.NAME`: they are saved with it, move with it,
    and are initializers of its ONNX file.  Layers that read the same tensor share it.

    Args:
        weights: path of a safetensors file, or a dict of tensors by name; nothing else is ever read, least of all
            pickled files.
    """

    untrained: ClassVar[bool] = False  # whether it also runs without any

    weights: Any = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Read the tensors; raises BadParameter, WeightsUnreadable."""
        super().__post_init__()
        if self.weights is None and self.untrained:
            return
        object.__setattr__(self, "weights", Weights.of(self.weights, self.name))

    @abstractmethod
    def expected(self, layers: Sequence[int], width: int) -> Mapping[str, Shape]:
        """Name and shape of every tensor that this pass needs at these layers of a stream of `width` channels."""


def _read(path: str, where: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not os.path.isfile(path):
        raise WeightsUnreadable(where=where, path=path, reason=_absent(path))
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        reason = f"cannot be read as safetensors ({first_line(error).rstrip('.')})"
        raise WeightsUnreadable(where=where, path=path, reason=reason) from error


def _tensor(name: Any, value: Any, where: str) -> Tensor:
    """A tensor that was handed over, on the CPU, if it is one whose numbers can be read."""
    import torch

    if isinstance(value, torch.Tensor) and not (value.is_quantized or value.is_complex() or value.is_meta):
        return value.detach().to_dense().cpu()
    known = isinstance(value, torch.Tensor)
    got = f"{name}: {f'{value.dtype} on {value.device}' if known else type(value).__name__}"
    hint = "torch.from_numpy makes one of an array."
    raise BadParameter(where=where, name="weights", rule="tensors of real numbers by name", got=got, hint=hint)


def _absent(path: str) -> str:
    if path.startswith(HANDED_OVER):
        return "these tensors were handed over in Python, and a recipe does not hold them; give the pass anew"
    return "no such file"


def _fits(shape: tuple[int, ...], expected: Shape) -> bool:
    return len(shape) == len(expected) and all(e in (None, s) for s, e in zip(shape, expected, strict=True))


def _shown(shape: Sequence[int | None]) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
