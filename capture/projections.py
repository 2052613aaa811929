"""Finding what the projections of attention read: the hidden state, behind a pre-norm block's norm."""

from __future__ import annotations

from torch import Tensor, fx

from .closure import SIZE
from .nodes import op_of
from .rotation import MIXES

READS = {"aten.linear": 0, "aten.matmul": 0, "aten.mm": 0, "aten.addmm": 1}  # the place of what is projected


def projected(keys: fx.Node) -> fx.Node | None:
    """The value [B, N, C] from which a linear layer makes `keys`; None where none does, or more than one.

    Between them may stand what does not mix channels and tokens by content: reshapes, a norm of heads, a rotation.
    """
    pending, seen, found = [keys], {keys}, set()
    while pending:
        node = pending.pop()
        op = op_of(node)
        if op in READS:
            found.add(node.args[READS[op]])
        elif op in MIXES:
            return None
        else:
            above = [one for one in node.all_input_nodes if one not in seen and one.target is not SIZE]
            seen.update(above)
            pending.extend(above)
    source = found.pop() if len(found) == 1 else None
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    return source if isinstance(value, Tensor) and value.dim() == 3 else None
