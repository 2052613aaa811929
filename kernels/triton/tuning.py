"""Finding block sizes: from those in the table, step by step to the fastest neighbour that fits the architecture.

A neighbour differs in one number: a block size halved or doubled, warps or pipeline stages one step up or down.  What
does not compile, spills, or takes more shared memory than there is, is not timed.  The climb ends where no neighbour is
faster by more than a clock can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ...target_errors import KernelNotCompiled
from .ahead import compile_launch
from .architecture import Architecture, Config
from .launch import Launch, Twin
from .resources import resources_of

WARPS, STAGES = (1, 2, 4, 8, 16), (1, 2, 3, 4)
GAIN = 0.02  # of the time, by which a neighbour must be faster


def neighbours(config: Config) -> Iterator[Config]:
    """Every configuration one step away.  Block sizes are constants that are powers of two, 16 or more."""
    for name, value in config.constants.items():
        if isinstance(value, int) and not isinstance(value, bool) and value >= 16 and value & (value - 1) == 0:
            for other in (value // 2, value * 2):
                if 16 <= other <= 4096:
                    yield Config({**config.constants, name: other}, config.warps, config.stages)
    for field, steps in (("warps", WARPS), ("stages", STAGES)):
        place = steps.index(getattr(config, field))
        for other in steps[max(place - 1, 0) : place + 2]:
            if other != getattr(config, field):
                step: dict[str, Any] = {field: other}
                yield replace(config, **step)


def fits(launch: Launch, architecture: Architecture) -> bool:
    """Whether a launch compiles without spilling and within the architecture's limits.  No GPU is needed."""
    try:
        binary = compile_launch(launch, architecture)
    except KernelNotCompiled:
        return False
    used = resources_of(binary)
    within = used.shared <= architecture.shared and used.registers * used.threads <= architecture.registers
    return within and not used.stack and not used.spills


def entries_of(twin: Twin, architecture: Architecture, args: tuple[Any, ...]) -> list[tuple[str, str]]:
    """The entries (kernel, key) of the tables that the launches for these arguments read."""
    asked: list[tuple[str, str]] = []
    twin.work(architecture.watched(asked), *args)
    return list(dict.fromkeys(asked))


def climb(
    twin: Twin,
    architecture: Architecture,
    args: tuple[Any, ...],
    entry: tuple[str, str],
    seconds: Callable[[list[Launch]], float],
) -> tuple[Config, float, float]:
    """The best configuration found for one entry, its time, and that of the one in the table.

    Args:
        twin: whose launches are timed, all together.
        architecture: of the GPU that `seconds` runs on.
        args: of the op, tensors of the sizes to tune for.
        entry: kernel and key.
        seconds: times launches.
    """
    kernel, key = entry
    best = architecture.config(kernel, key)
    first = fastest = seconds(twin.work(architecture, *args)[0])
    seen = {repr(best)}
    while True:
        found = None
        for one in neighbours(best):
            if repr(one) in seen:
                continue
            seen.add(repr(one))
            launches = twin.work(architecture.having(kernel, key, one), *args)[0]
            if all(fits(launch, architecture) for launch in launches if launch.name == kernel):
                time = seconds(launches)
                if time < fastest * (1 - GAIN):
                    found, fastest = one, time
        if found is None:
            return best, fastest, first
        best = found
