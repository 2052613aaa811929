"""`CompiledModel`: the rewritten model as an `nn.Module`, with what is known of it and what can be done with it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..error_text import brief
from ..errors import BadParameter, InputMismatch, OriginalMissing
from ..graph import TokenGraph
from ..report import Benchmark, Drift, Report
from ..target import Target
from .files import named
from .guard import Guard
from .inputs import Call, Inputs, called, describe, mask_of, misfit
from .positions import Tables
from .recipe import Recipe

if TYPE_CHECKING:
    from ..lowering.cross_compile import CrossCompiled


class CompiledModel(nn.Module):
    """A rewritten model.  Call it as the original: any batch size, positional or keyword arguments, or one dict.

    report   what changed, tokens per layer, FLOPs, drift (`print(fast.report)`)
    graph    the rewritten `TokenGraph`;  original: the captured one, None after `tamis.load`
    recipe   how it was made
    guard    which sizes the original runs at, and why (`print(fast.guard)`); None without never_slower or dense_below

    It is a module: `state_dict` has the original's keys, and parameters are shared with the original, so loading
    weights into one loads them into both.  `eval()` and `train()` only set the flag: the model was captured in eval
    mode, and dropout stays off.  `to(device)` moves original and result and lowers again; `to(dtype)` and its kin are
    refused, because a captured graph has the casts of the dtype it was captured in: convert the model, then compile.
    """

    report: Report
    recipe: Recipe

    def __init__(
        self,
        *,
        graph: TokenGraph,
        original: TokenGraph | None,
        call: Call,
        recipe: Recipe,
        report: Report,
        target: Target,
        mode: str | None = None,
        token_map: bool = False,
        never_slower: bool = False,
    ) -> None:
        super().__init__()
        self.graph, self.original = graph, original
        self.example_call = call
        self.recipe = recipe
        self.report = report
        self.target = target
        self.mode = mode
        self.token_map = token_map
        self.guard = Guard.of(self, never_slower)
        self._inputs = Inputs.of(graph.program)
        self._positions = Tables(graph.program)
        self._callables: dict[str, Callable[..., Any]] = {}
        self._adopt_weights()
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original returns; with token_map=True (that, token_map [B, N] int64)."""
        args, kwargs = self._inputs.bind(args, kwargs)
        if self.guard is not None and not self.guard.prefers_result((args, kwargs)):
            return self._run("original", self._original("forward"), (args, kwargs))
        return self._run("result", self.graph, (args, kwargs))

    def _run(self, which: str, graph: TokenGraph, call: Call) -> Any:
        self._positions.check(call, self.graph.name)
        try:
            return called(self._lowered(which, graph), call, self.graph.name)
        except (AttributeError, RuntimeError, TypeError, ValueError, InputMismatch) as error:
            found = misfit(graph.program, call)
            if not found:
                raise
            rule, hint = (
                "inputs must be as the example's, batch and length apart",
                "convert them, or compile for these.",
            )
            raise InputMismatch(where=self.graph.name, rule=rule, got=found, hint=hint) from error

    def verify(self, *args: Any, **kwargs: Any) -> Drift:
        """Run original and result on these inputs and compare; example inputs when there are none.

        Tokens that an input called `attention_mask` hides are left out of outputs with a token axis.

        Raises:
            OriginalMissing: the model was loaded from a file.
        """
        from .verify import drift, token_axes_of

        original = self._original("verify")
        call = self._call(args, kwargs)
        with torch.no_grad():
            before = self.run_original(*call[0], **call[1])
            after = called(self._lowered("result", self.graph), call, original.name)
        after = after[0] if self.token_map else after
        mask = mask_of(original.program, call)
        if mask is None:
            return drift(before, after)
        return drift(before, after, mask[1], token_axes_of(original.program, mask[0]))

    def run_original(self, *args: Any, **kwargs: Any) -> Any:
        """What the original returns for these inputs; example inputs when there are none.

        Raises:
            OriginalMissing: the model was loaded from a file.
            InputMismatch: the original does not run on these inputs.
        """
        original = self._original("run_original")
        with torch.no_grad():
            return called(self._lowered("original", original), self._call(args, kwargs), original.name, own=True)

    def benchmark(self, *args: Any, repeats: int = 7, **kwargs: Any) -> Benchmark:
        """Time original against result on these inputs, A B A B; example inputs when there are none.

        Both are lowered alike (target and mode).  `print` it: one line.

        Raises:
            OriginalMissing: the model was loaded from a file.
        """
        from .benchmark import benchmark

        original = self._original("benchmark")
        call = self._call(args, kwargs)
        before, after = self._lowered("original", original), self._lowered("result", self.graph)
        with torch.no_grad():
            self.run_original(*call[0], **call[1])  # inputs that do not fit are said so
            return benchmark(
                lambda: before(*call[0], **call[1]),
                lambda: after(*call[0], **call[1]),
                repeats=repeats,
                shapes=_shapes(original, call),
                device=self.device,
                mode=self.mode or "eager",
            )

    def benchmark_onnx(
        self, path: str | os.PathLike[str], *args: Any, repeats: int = 7, ort_contrib: bool = False, **kwargs: Any
    ) -> Benchmark:
        """Time the ONNX file that `export` wrote against the original exported alike, both in ONNX Runtime on the CPU.

        Exporting the original takes as long as exporting the result did.

        Raises:
            OriginalMissing: the model was loaded from a file.
        """
        from .benchmark import benchmark_onnx

        original = self._original("benchmark")
        call = self._call(args, kwargs)
        leaves = pytree.tree_leaves(call)
        shapes = _shapes(original, call)
        return benchmark_onnx(original.program, path, leaves, contrib=ort_contrib, repeats=repeats, shapes=shapes)

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        inline: bool = False,
        ort_contrib: bool = False,
        overwrite: bool = False,
        check: bool = True,
    ) -> str:
        """Write an ONNX file; weights over 2 GB go to `path.data` beside it.  Returns the path.

        With ort_contrib, causal and sparse attention call ONNX Runtime's own operators where they compute the same:
        faster there, and no other runtime knows the file.  The report notes at which layers they do, or why not.

        With check, ONNX Runtime must agree with torch at another batch size and another length than the example's;
        otherwise nothing is kept.

        Raises:
            OutputExists, OutputNotWritable, ExportFailed, BackendMismatch.
        """
        from .package import export_checked

        path = named("CompiledModel.export", path, ".onnx")
        options = {"inline": inline, "ort_contrib": ort_contrib, "overwrite": overwrite}
        return export_checked(self, path, check=check, **options)

    def save(self, path: str | os.PathLike[str], *, native: bool = False, overwrite: bool = False) -> str:
        """Write the rewritten program, its recipe and its report to a `.pt2` file for `tamis.load`.  Returns the path.

        Args:
            path: ends in .pt2.
            native: compile it by AOTInductor (minutes) into a package of native code for the kind of device the weights
                are on, which runs without tamis: `torch._inductor.aoti_load_package(path)`.
            overwrite: replace an existing file.

        Raises:
            OutputExists, OutputNotWritable, ExportFailed.
        """
        from .native import save_native
        from .package import save_package

        path = named("CompiledModel.save", path, ".pt2")
        if native:
            return save_native(self, path, overwrite=overwrite)
        return save_package(self, path, overwrite=overwrite)

    def draw(
        self, path: str | os.PathLike[str], *args: Any, row: int = 0, overwrite: bool = False, **kwargs: Any
    ) -> str:
        """Draw where the tokens of one image went, reduction by reduction, into a .png file.  Returns the path.

        Runs the result on these inputs (the example's when there are none) and shows their row `row`.

        Raises:
            CannotDraw: no input is an image, its patches are on no grid, nothing is reduced, or no .png is named.
            MissingDependency, OutputExists, OutputNotWritable.
        """
        from .draw import draw

        draw(self, Path(path), self._call(args, kwargs), row, overwrite=overwrite)
        return os.fspath(path)

    def write_kernels(self, directory: str | os.PathLike[str], architecture: str | None = None) -> CrossCompiled:
        """Compile the kernels the model needs on a GPU, which need not be here, into `directory`.

        Writes `kernels.json` (what each kernel takes: registers, shared memory, spills) and the folder `kernels`, which
        must not be there yet.  `tamis.load` of a file beside them uses them where version and architecture match.

        Args:
            directory: an existing folder.
            architecture: such as "sm_90" or "gfx942"; that of the target when None.

        Raises:
            UnknownTarget: neither names an architecture.
            MissingDependency, KernelInterpreted, KernelNotCompiled, OutputExists, OutputNotWritable.
        """
        from .binaries import write_kernels

        target = self.target if architecture is None else Target.named(architecture)
        return write_kernels(self.graph.program, Path(directory), target)

    def with_original(self, original: TokenGraph | None) -> CompiledModel:
        """This model with an original to verify against and to time (a loaded one has none); changes it in place."""
        if not isinstance(original, TokenGraph | None):
            rule, hint = "a captured graph", "tamis.capture.capture(model, args) makes one."
            raise BadParameter(where="with_original", name="original", rule=rule, got=brief(original), hint=hint)
        self.original = original
        self._callables.pop("original", None)
        self.guard = Guard.again(self)
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are; CPU for a model without any."""
        return next((p.device for p in [*self.parameters(), *self.buffers()]), torch.device("cpu"))

    def extra_repr(self) -> str:
        """The headline of the report."""
        return self.report.headline()

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        return self._inputs.bind(args, kwargs) if args or kwargs else self.example_call

    def _original(self, what: str) -> TokenGraph:
        if self.original is None:
            raise OriginalMissing(what=what)
        return self.original

    def _lowered(self, which: str, graph: TokenGraph) -> Callable[..., Any]:
        if which not in self._callables:
            from ..lowering.callables import lower

            self._callables[which] = lower(graph.program, self.target, self.mode)
        return self._callables[which]

    def _adopt_weights(self) -> None:
        """Hang the program's parameter holders into this module, so that state_dict has the original's keys."""
        module = self.graph.program.module()
        own = {"_guards_fn"}
        self._modules.update({name: child for name, child in module._modules.items() if name not in own})
        self._parameters.update(module._parameters)
        self._buffers.update(module._buffers)
        self._non_persistent_buffers_set |= module._non_persistent_buffers_set

    def _apply(self, fn: Any, recurse: bool = True) -> CompiledModel:
        """Behind to(), cuda(), half()...: a move to another device is done on the programs, another dtype refused."""
        weights = [*self.parameters(), *self.buffers()]
        probe = next((w for w in weights if w.is_floating_point()), weights[0] if weights else None)
        if probe is None:
            return self
        there = fn(torch.empty(0, dtype=probe.dtype, device=probe.device))
        if there.dtype != probe.dtype:
            rule = f"the compiled model keeps the dtype it was captured in, {probe.dtype}"
            hint = "convert the original model, then compile it."
            raise InputMismatch(where="to", rule=rule, got=there.dtype, hint=hint)
        return self if there.device == probe.device else self._moved(there.device)

    def _moved(self, device: torch.device) -> CompiledModel:
        from .package import moved

        self.graph = moved(self.graph, device)
        self.original = None if self.original is None else moved(self.original, device)
        self.example_call = pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), self.example_call)
        self.target = Target(device.type) if device.type in ("cpu", "cuda") else self.target
        self._callables.clear()
        self.guard = Guard.again(self)  # what was timed elsewhere says nothing here
        self._adopt_weights()
        return self


def _shapes(original: TokenGraph, call: Call) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in describe(original.program, call).items())
