"""What is known of the token stream while a graph is re-executed: the composed plans and what follows from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import kernels as kernels  # registers the ops
from ..tokens import Plan


class StreamState:
    """Composed reductions of one stream.  Epoch e is the stream after e plans; epoch 0 the original sequence.

    All tensors are traced: every question asked here may add nodes to the graph, each once (answers are kept).
    """

    def __init__(
        self,
        batch: Any,
        count: Any,
        valid: Tensor | None,
        device: torch.device,
        grid: tuple[int, int] | None = None,
    ) -> None:
        self.batch, self.device = batch, device
        self.grid = self.lattice = grid  # the grid that the patch tokens of now fill, and the last there was
        self._lattice_epoch = 0
        self.counts: list[Any] = [count]  # tokens at every epoch
        self.first_count = count if valid is None else None  # of every row of the original sequence alike
        self.plans: list[Plan] = []
        self.plan_sizes: list[Tensor | None] = []  # sizes before each plan
        self.left: tuple[Tensor | None, ...] = ()  # the stream before each plan whose dropped tokens pass through
        self.valid, self.padded = valid, valid is not None  # what does not hold a token now; whether some never did
        self.sizes: Tensor | None = None
        self.size_bias = False
        self._leaders: dict[int, tuple[int, Tensor]] = {}
        self._sources: dict[int, Tensor] = {}
        self._bias: tuple[int, Tensor | None] | None = None
        self.first_valid = valid

    @property
    def epoch(self) -> int:
        """Reductions so far."""
        return len(self.plans)

    @property
    def drops(self) -> bool:
        """Whether any plan dropped real tokens."""
        return self.dropped_by(self.epoch)

    def dropped_by(self, epoch: int) -> bool:
        """Whether one of the first `epoch` plans dropped real tokens."""
        return any(plan.drops for plan in self.plans[:epoch])

    def lost_by(self, epoch: int) -> bool:
        """Whether one of the first `epoch` plans lost real tokens: dropped, not passing through, or in a mere sum."""
        plans = zip(self.plans[:epoch], self.left, strict=False)
        return any((plan.drops and left is None) or not plan.stands for plan, left in plans)

    def advance(self, x: Tensor, plan: Plan, *, size_bias: bool, passthrough: bool = False) -> Tensor:
        """Apply one more plan to the stream [B, N, C] and compose it; `sizes` and `valid` then speak of its slots.

        With `passthrough` the tokens that it drops are remembered as they are (see `with_dropped`).
        """
        self.plan_sizes.append(self.sizes)
        self.left = (*self.left, x if passthrough and plan.drops else None)
        merges, sizes = plan.moved is not None and plan.counts_sizes, plan.sizes
        if sizes is None and merges and plan.normalize and plan.weight is self.sizes:
            y, mass = torch.ops.tamis.merge_tokens(x, plan.slot, plan.leader, plan.moved, plan.weight, plan.spare)
            x = _rescaled(y, x, plan)
            sizes = mass if plan.valid is None else torch.where(plan.valid, mass, 0.0)
        else:
            x = self.reduce(x, plan)
            if sizes is None and (merges or self.sizes is not None):
                sizes = self._added_up(plan)
        self.plans.append(plan)
        self.counts.append(plan.out)
        self.grid = plan.grid
        if plan.grid is not None:
            self.lattice, self._lattice_epoch = plan.grid, self.epoch
        self.valid, self.sizes = plan.valid, sizes
        self.size_bias = self.size_bias or (size_bias and sizes is not None)
        return x

    def sizes_at(self, epoch: int) -> Tensor | None:
        """Sizes at an epoch, [B, N] float32; None where every slot is one token."""
        return self.sizes if epoch == self.epoch else self.plan_sizes[epoch]

    def valid_at(self, epoch: int) -> Tensor | None:
        """[B, N] bool slots that hold a token at an epoch; None where all do."""
        return self.valid if epoch == self.epoch else self.plans[epoch - 1].valid if epoch else self.first_valid

    def current_sizes(self, epoch: int | None = None) -> Tensor:
        """[B, N] float32 original tokens per slot, 0 at slots without a token; of an epoch (now)."""
        epoch = self.epoch if epoch is None else epoch
        sizes = self.sizes_at(epoch)
        if sizes is not None:
            return sizes
        valid = self.valid_at(epoch)
        if valid is not None:
            return valid.float()
        return torch.ones(self.batch, self.counts[epoch], device=self.device)

    def _added_up(self, plan: Plan) -> Tensor:
        before = self.current_sizes().unsqueeze(-1)
        added = torch.ops.tamis.reduce_tokens(before, plan.slot, plan.leader, plan.moved, None, False).squeeze(-1)
        return added if plan.valid is None else torch.where(plan.valid, added, 0.0)

    def reduce(self, x: Tensor, plan: Plan) -> Tensor:
        """Apply one plan to [B, N, C]."""
        if plan.appended is not None:
            return torch.cat([x, plan.appended.to(x.dtype)], dim=1)
        y = torch.ops.tamis.reduce_tokens(x, plan.slot, plan.leader, plan.moved, plan.weight, plan.normalize)
        return _rescaled(y, x, plan)

    def reduce_all(self, x: Tensor) -> Tensor:
        """Apply every plan in order to a [B, N0, C] value of the original length, which is the stream from here on."""
        for epoch, plan in enumerate(self.plans):
            if self.left[epoch] is not None:
                self.left = (*self.left[:epoch], x, *self.left[epoch + 1 :])
            x = self.reduce(x, plan)
        return x

    def with_dropped(self, x: Tensor, left: tuple[Tensor | None, ...]) -> Tensor:
        """[B, N0, C] of the stream's state x [B, N, C] after len(left) plans, whose `left` it was then.

        A token that was dropped on the way is what it was when it left; padding is zero, or what it was.
        """
        for plan, before in zip(self.plans[: len(left)][::-1], left[::-1], strict=True):
            here = take_rows(x, plan.slot, 1, 0)
            x = here if before is None else torch.where((plan.slot >= 0).unsqueeze(-1), here, before)
        return x

    def leader(self, since: int) -> Tensor:
        """[B, N] index, at epoch `since`, of the token that leads each slot of now."""
        done, index = self._leaders.get(since, (since + 1, self.plans[since].leader))
        for plan in self.plans[done:]:
            index = index.gather(1, plan.leader)
        self._leaders[since] = (self.epoch, index)
        return index

    def source(self, epoch: int | None = None) -> Tensor:
        """[B, N0] slot that every original token is in at an epoch (now); -1: dropped or padding."""
        epoch = self.epoch if epoch is None else epoch
        done = max((known for known in self._sources if known <= epoch), default=1)
        slot = self._sources.get(done, self.plans[0].slot)
        for plan in self.plans[done:epoch]:
            slot = torch.where(slot >= 0, plan.slot.gather(1, slot.clamp(min=0)), -1)
        self._sources[epoch] = slot
        return slot

    def positions(self) -> Tensor:
        """[B, N] int64 rank of each slot's leader among the row's original real tokens."""
        if self.first_valid is None:
            ranks = torch.arange(self.counts[0], device=self.device).unsqueeze(0).expand(self.batch, self.counts[0])
        else:
            ranks = (self.first_valid.cumsum(1) - 1).clamp(min=0)
        return ranks.gather(1, self.leader(0)) if self.plans else ranks

    def places(self, prefix: int) -> Tensor:
        """[B, N] int64 place of each slot's leader in the lattice, in raster order; below 0 for the `prefix` tokens."""
        since = self._lattice_epoch
        if since < self.epoch:
            return self.leader(since) - prefix
        count = self.counts[-1]
        return (torch.arange(count, device=self.device) - prefix).unsqueeze(0).expand(self.batch, count)

    def key_bias(self) -> Tensor | None:
        """[B, N] float32 added to the logits of each key: log size where tracked, -inf where there is no token."""
        if self._bias is None or self._bias[0] != self.epoch:
            self._bias = (self.epoch, self._make_bias())
        return self._bias[1]

    def _make_bias(self) -> Tensor | None:
        if self.size_bias and self.sizes is not None:
            return self.sizes.log()  # sizes are 0 at slots without a token
        if self.valid is None:
            return None
        return torch.where(self.valid, 0.0, float("-inf"))

    def gather(self, x: Tensor, dim: int, batch: int | None, since: int, start: int = 0) -> Tensor:
        """Bring axis `dim` of x from epoch `since` to now, each slot taking its leader's row.

        A value without batch axis (batch None) gets one in front of all others and must be shaped for it by the caller.
        """
        index = self.leader(since)
        if start:
            index = index[:, start:] - start
        return take_rows(x, index, dim, batch)

    def restore(self, x: Tensor, dim: int, batch: int, since: int, start: int = 0) -> Tensor:
        """Put axis `dim` of a value of epoch `since` back to the original length; dropped tokens and padding: zeros."""
        source = self.source(since)
        if start:
            source = source[:, start:] - start
        return take_rows(x, source, dim, batch)


def _rescaled(y: Tensor, x: Tensor, plan: Plan) -> Tensor:
    """What x was reduced to, with the norms that the plan wants."""
    if not plan.max_norm or plan.moved is None:
        return y
    return torch.ops.tamis.rescale_tokens(y, x, plan.slot, plan.leader, plan.moved)


def take_rows(x: Tensor, index: Tensor, dim: int, batch: int | None) -> Tensor:
    """y[b, .., i, ..] = x[b, .., index[b, i], ..] along `dim`; zeros where the index is -1."""
    assert batch is not None
    rows = x.movedim((batch, dim), (0, 1))
    return torch.ops.tamis.restore_tokens(rows, index).movedim((0, 1), (batch, dim))
