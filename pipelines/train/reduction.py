"""Mean gradients over the shares of a step, with the same bits on any number of workers.

`DistributedDataParallel` adds in the order of its backend's all-reduce, which depends on the number
of workers. Here each worker adds its own shares in a tree, sends every other worker a piece of what
it has (all-to-all), adds the pieces that it gets as the tree goes on, and sends the sums to all
(all-gather). With as many shares for each worker that moves as many bytes as a ring's all-reduce;
it goes on bucket by bucket during the backward pass of the last share.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipelines.train.agreement import gather
from pipelines.train.shares import Node, Tree, allot, allot_anew, places

BUCKET_BYTES = 25 * 2**20
"""Of gradients that are sent together; DistributedDataParallel's own default."""
IN_FLIGHT = 2
"""Buckets whose pieces are under way before a worker waits for those of the first."""


class Sum:
    """The sum over the shares of a step of some tensors, by all workers together.

    Args:
        like: tensors of the shapes, strides and dtypes that are added.
        ranges: the shares of each worker.
        rank: whose part this is.
    """

    def __init__(self, like: Sequence[Tensor], ranges: Sequence[range], rank: int) -> None:
        self.ranges, self.rank = ranges, rank
        self.layout = [(t.shape, t.stride(), t.numel()) for t in like]
        workers = len(ranges)
        self.piece = -(-sum(t.numel() for t in like) // workers)
        self.dtype, self.device = like[0].dtype, like[0].device
        self.tree = Tree()
        self._counts = [len(places(shares)) for shares in ranges]
        self._received: Tensor | None = None
        self._work: Any = None

    def add(self, share: int, tensors: Sequence[Tensor]) -> None:
        """What a share gives; the shares of this worker in their order."""
        flat = self._empty()
        torch._foreach_copy_(self.views(flat), list(tensors))
        self.tree.add(Node(share, 1, flat))

    def send(self) -> None:
        """Begin to send what this worker's shares gave to the others."""
        if len(self.ranges) == 1:
            return
        own = [node.value.view(len(self.ranges), self.piece) for node in self.tree.nodes]
        sent = own[0] if len(own) == 1 else torch.stack(own, 1)
        if self._received is None:
            shape = sum(self._counts), self.piece
            self._received = torch.empty(shape, dtype=self.dtype, device=self.device)
        self._work = dist.all_to_all_single(
            self._received.view(-1),
            sent.reshape(-1),
            [count * self.piece for count in self._counts],
            [len(own) * self.piece] * len(self.ranges),
            async_op=True,
        )
        self._sent = sent  # until it arrived

    def gather(self) -> None:
        """Add the pieces that arrived, and begin to send the sums to the others."""
        if len(self.ranges) == 1:
            self.flat = self.tree.total()
            return
        assert self._received is not None
        self._work.wait()
        self.tree.spare += [node.value for node in self.tree.nodes]
        self.tree.nodes.clear()
        tree, pieces = Tree(), iter(self._received)
        for shares in self.ranges:
            for first, size in places(shares):
                tree.add(Node(first, size, next(pieces)))
        self.flat, self._mine = self._empty(), tree.total()
        self._work = dist.all_gather_into_tensor(self.flat, self._mine, async_op=True)

    def result(self) -> list[Tensor]:
        """The sums, once `gather` was called: views that hold until `add` is called again."""
        if self._work:
            self._work.wait()
            self._work = None
        self.tree.spare.append(self.flat)
        return self.views(self.flat)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts of a flat tensor, as the given tensors lie in memory."""
        found, start = [], 0
        for shape, stride, count in self.layout:
            found.append(flat.as_strided(shape, stride, start))
            start += count
        return found

    def _empty(self) -> Tensor:
        if self.tree.spare:
            return self.tree.spare.pop()
        size = self.piece * len(self.ranges)
        return torch.zeros(size, dtype=self.dtype, device=self.device)  # so the padding is no NaN


class Bucket(Sum):
    """The gradients of some parameters."""

    def __init__(self, parameters: list[nn.Parameter], ranges: Sequence[range], rank: int) -> None:
        super().__init__(parameters, ranges, rank)
        self.parameters = parameters
        self.missing = 0
        """Gradients that the backward pass has not made yet."""


class Reducer:
    """Makes the mean over the shares of a step of gradients, batch norm's statistics and losses.

    For each of its own shares, a worker runs the forward and backward pass within `share`. Then all
    workers call `finish`, and all parameters have their mean gradient: 0 where nothing was made.

    Args:
        model: on the device where it is trained; what requires no gradient now gets none. All
            workers take over what it is on rank 0.
        shares: of a step; as many as workers, or more.
        rank, world_size: of this process.
    """

    def __init__(self, model: nn.Module, shares: int, rank: int, world_size: int) -> None:
        self.model, self.rank = model, rank
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._made)
        if world_size > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, 0)
                tensor.detach().copy_(whole)
        self._allot(allot(shares, [1.0] * world_size))

    @property
    def own(self) -> range:
        """The shares of this worker."""
        return self.ranges[self.rank]

    def follow_speed(self, seconds: float) -> None:
        """Let faster workers have more shares from the next step on; all workers call it.

        Args:
            seconds: that this worker's forward pass of a share took, in any unit.
        """
        ranges = allot_anew(self.ranges, gather(seconds, len(self.ranges)))
        if ranges != self.ranges:
            self._allot(ranges)

    def _allot(self, ranges: list[range]) -> None:
        self.ranges = ranges
        self.buckets: list[Bucket] = []
        filling: list[nn.Parameter] = []
        size = 0
        # The backward pass makes the last ones' first.
        for parameter in reversed(self.parameters):
            filling.append(parameter)
            size += parameter.numel() * parameter.element_size()
            if size >= BUCKET_BYTES:
                self.buckets.append(Bucket(filling, self.ranges, self.rank))
                filling, size = [], 0
        if filling:
            self.buckets.append(Bucket(filling, self.ranges, self.rank))
        self._owner = {p: bucket for bucket in self.buckets for p in bucket.parameters}
        self._sent: deque[Sum] = deque()
        self._further: Sum | None = None
        self._start: list[Tensor] = []

    @contextmanager
    def share(self, share: int) -> Iterator[list[Tensor]]:
        """Within it, the backward pass of a share is run; the shares of a worker in their order.

        What is put into the list, such as losses, is added up beside the gradients.
        """
        self._share, self._next = share, 0
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters)
        norms = [*self._statistics(), *self._counters()]
        if share == self.own.start:
            self._start = [tensor.clone() for tensor in norms]
            for parameter in self.parameters:
                parameter.grad = None
        elif norms:  # each share begins with what the step began with
            torch._foreach_copy_(norms, self._start)
        further: list[Tensor] = []
        yield further
        self._pass_on(all_of_them=True)
        if any(p.grad is not None for p in self.parameters):
            raise RuntimeError("a backward pass made a gradient in several parts: not supported")
        values = [t.detach().to(torch.float32) for t in (*further, *self._statistics())]
        if values:
            if self._further is None:
                self._further = Sum(values, self.ranges, self.rank)
            self._further.add(share, values)

    def finish(self) -> list[Tensor]:
        """Make all means; those of what `share` was given are returned."""
        count = self.ranges[-1].stop
        if self._further:
            self._further.send()
            self._sent.append(self._further)
        while self._sent:
            self._sent.popleft().gather()
        for bucket in self.buckets:
            for parameter, gradient in zip(bucket.parameters, bucket.result(), strict=True):
                if parameter.requires_grad:  # not frozen since
                    parameter.grad = gradient
            bucket.flat.div_(count)
        means: list[Tensor] = []
        if self._further:
            means = self._further.result()
            self._further.flat.div_(count)
            self._further = None
        norms = self._statistics()
        if norms:
            torch._foreach_copy_(norms, means[-len(norms) :])
        return means[: len(means) - len(norms)]

    def _statistics(self) -> list[Tensor]:
        """Means and variances that batch norm keeps of what it is trained with."""
        return [t for m in self._norms() for t in (m.running_mean, m.running_var) if t is not None]

    def _counters(self) -> list[Tensor]:
        """Of batch norm: each share counts as if it were the step's only one."""
        return [m.num_batches_tracked for m in self._norms() if m.num_batches_tracked is not None]

    def _norms(self) -> list[_BatchNorm]:
        return [m for m in self.model.modules() if isinstance(m, _BatchNorm) and m.training]

    def _made(self, parameter: nn.Parameter) -> None:
        self._owner[parameter].missing -= 1
        self._pass_on()

    def _pass_on(self, all_of_them: bool = False) -> None:
        """Take the gradients of buckets that are complete. In their order, on all workers."""
        while self._next < len(self.buckets):
            bucket = self.buckets[self._next]
            if bucket.missing and not all_of_them:
                return
            self._next += 1
            bucket.add(
                self._share,
                [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket.parameters],
            )
            for parameter in bucket.parameters:
                parameter.grad = None
            if self._share == self.own[-1]:
                bucket.send()
                self._sent.append(bucket)
                if len(self._sent) > IN_FLIGHT:
                    self._sent.popleft().gather()
