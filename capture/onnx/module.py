"""`OnnxModule`: an ONNX graph as a torch module, called by the file's input names."""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Iterable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from .evaluate import Evaluator, Values
from .known import Known
from .reader import OnnxFile


class OnnxModule(nn.Module):
    """Evaluates a file's graph.

    Called with its inputs by position or by name (names that are no Python identifiers are made ones, see
    `input_names`); returns the one output, or a dict of all by name.  Weights are parameters and buffers under the
    names of the initializers (`.weight` is added to a name without a dot, `_` to one that torch has for itself).

    inputs, outputs  the file's values;  input_names  what `forward` calls its parameters
    """

    def __init__(self, file: OnnxFile, fixed: Mapping[str, Tensor] | None = None, *, carry: bool = True) -> None:
        """Make the module; raises UnknownOps.

        Args:
            file: what `read_onnx` returned.
            fixed: inputs that are constants of the module rather than its arguments, by name.
            carry: whether ONNX Runtime may evaluate what has no form in torch.
        """
        super().__init__()
        self.inputs = [value for value in file.inputs if value.name not in (fixed or {})]
        self.outputs = list(file.graph.outputs)
        self.input_names = identifiers(str(value.name) for value in self.inputs)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, kind, annotation=Tensor) for name in self.input_names]
        signature = inspect.Signature(parameters)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._evaluated(signature.bind(*args, **kwargs).arguments)

        forward.__signature__ = signature  # type: ignore[attr-defined]
        self._evaluator = _OnModule(self, file, fixed or {}, carry=carry)
        self.forward = forward  # an attribute, because every file has parameters of its own
        self.eval()

    def shape_of(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """The shape of a weight; None for another value."""
        return tuple(self._evaluator.weight(value).shape) if value in self._evaluator.places else None

    def file_names(self) -> dict[str, str]:
        """The initializer's name of every weight that hangs under another one."""
        paths = {id(one): path for path, one in (*self.named_parameters(), *self.named_buffers())}
        held = self._evaluator.places.items()
        names = {paths[id(getattr(module, last))]: str(value.name) for value, (module, last) in held}
        return {path: name for path, name in names.items() if path != name}

    def _evaluated(self, arguments: Mapping[str, Any]) -> Any:
        values: Values = {value: arguments[name] for value, name in zip(self.inputs, self.input_names, strict=True)}
        self._evaluator.run(self._evaluator.nodes, values)
        results = {str(one.name): self._result(self._evaluator.value(one, values)) for one in self.outputs}
        return next(iter(results.values())) if len(results) == 1 else results

    def _result(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._result(one) for one in value]
        return value.tensor() if isinstance(value, Known) else value


class _OnModule(Evaluator):
    """An evaluator whose weights hang in a module, where export and `to` find them."""

    def __init__(self, module: nn.Module, file: OnnxFile, fixed: Mapping[str, Tensor], *, carry: bool) -> None:
        self.places: dict[ir.Value, tuple[nn.Module, str]] = {}
        super().__init__(file, fixed, carry=carry)
        used = self.used_weights()
        for value, weight in self.weights.items():
            if value in used:
                self.places[value] = _hang(module, str(value.name), weight)
        self.weights = dict.fromkeys(self.weights, None)  # type: ignore[assignment]

    def weight(self, value: ir.Value) -> Tensor:
        if value not in self.places:  # they are hung up last
            return super().weight(value)
        module, name = self.places[value]
        return getattr(module, name)


def _hang(module: nn.Module, name: str, weight: Tensor) -> tuple[nn.Module, str]:
    """Register a weight under its dotted name; a place that is taken, or no place, gets another name.

    A name without a dot gets one: names such as `val_74` and `add_3` are given to computed values on the way out.
    """
    *path, last = [re.sub(r"\s", "_", part) or "_" for part in (name if "." in name else f"{name}.weight").split(".")]
    for part in path:
        child = module._modules.get(part)
        if child is None:
            part = _free(module, part)
            child = nn.Module()
            module.add_module(part, child)
        module = child
    last = _free(module, last)
    if weight.is_floating_point() or weight.dtype in (torch.int8, torch.uint8):  # quantised ones are learned too
        module.register_parameter(last, nn.Parameter(weight, requires_grad=False))
    else:
        module.register_buffer(last, weight)
    return module, last


def _free(module: nn.Module, name: str) -> str:
    while hasattr(module, name):
        name += "_"
    return name


def identifiers(names: Iterable[str]) -> list[str]:
    """The names as Python identifiers, all different."""
    found: list[str] = []
    for name in names:
        plain = re.sub(r"\W", "_", name)
        plain = f"input_{plain}" if not plain or plain[0].isdigit() or keyword.iskeyword(plain) else plain
        while plain in found or plain == "self":
            plain += "_"
        found.append(plain)
    return found
