"""Where the time of a training step goes. A range is timed in forward and in backward, and named in a profile.

At each moment the innermost range that has begun is running; what is in none of them is "rest". So the parts of a step
add up to the step. Each comprises its forward, its backward, and what backward computes again for it:

  gate       scores, noise, choice and capacity; in a hierarchical layer the gates of its groups too
  dispatch   rows and weights on their way to the experts and back: counts, sorting, copies, calls to other ranks, and
             the wait there for a rank that comes later
  experts    what the experts compute and copy for it, and the gradients of their weights on this rank
  optimizer  gradients of experts and rows summed over ranks, the norm, the update, and what ZeRO does around it
  rest       everything else: data, the other layers, the loss with the sums of balance losses over ranks, dense
             gradients that ZeRO reduces within backward

Autograd runs what is ready in the reverse order of its making. So a range's part of backward is what runs between two
views: that of its first output, made last, and that of its first argument, made first.

On CUDA a range ends with an event on the stream; events are read when the stream has passed them, so nothing waits for
them within a step.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

PARTS = ("gate", "dispatch", "experts", "optimizer", "rest")


class StepTimer:
    """Of one rank. It runs within `step` alone: elsewhere ranges are the plain calls."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.running = False
        self.annotate_profile = False  # ranges are told to torch's profiler
        self._open: list[_Range] = []
        self._forwards: list[tuple[nn.Module, _Range, _Range | None]] = []  # under way
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._last = 0.0  # when the last range began or ended
        self._events: list[
            tuple[str, torch.cuda.Event]
        ] = []  # the part that ended there; "" where a step begins

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around what is to be timed."""
        self._settle()
        self._open.clear()
        self._forwards.clear()
        self._last, self.running = time.perf_counter(), True
        if self.on_cuda:
            self._events.append(("", _event()))
        try:
            yield
        finally:
            self._tick()
            self.running = False

    def read_and_reset(self) -> dict[str, float]:
        """Seconds of each of PARTS, of all steps since the last reading. Waits for the stream."""
        if self._events:
            self._events[-1][1].synchronize()
        self._settle()
        seconds, self._seconds = self._seconds, defaultdict(float)
        return {part: seconds[part] for part in PARTS}

    @contextlib.contextmanager
    def range(self, part: str, name: str = "") -> Iterator[None]:
        """Around what has no backward of its own. `name`: of it in a profile, the part's where there is none."""
        if not self.running:
            yield
            return
        opened = _Range(self, part, name or part)
        opened.begin()
        try:
            yield
        finally:
            opened.end()

    def attach(self, module: nn.Module, part: str, name: str) -> None:
        """Times every forward of a module, and its backward, by forward hooks.

        Args:
            module: Its forward takes a tensor first and returns a tuple, first of which is a tensor or a
                dataclass with the differentiable tensor `gate_N` (`moe.routing.Routing`).
            part: One of PARTS.
            name: Name of the range in a profile.
        """

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not self.running:
                return None
            forward = _Range(self, part, name)
            forward.begin()
            x, *others = args
            backward = None
            if x.requires_grad:  # else nothing marks the end of its backward
                backward = _Range(self, part, f"{name} (backward)")
                x = _before_backward_of(x, backward.end)
            self._forwards.append((module, forward, backward))
            return x, *others

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> tuple[Any, ...] | None:
            if not self._forwards or self._forwards[-1][0] is not module:
                return None  # the timer was not running when this forward began
            _, forward, backward = self._forwards.pop()
            first, *others = output
            if backward is None:
                pass
            elif isinstance(first, torch.Tensor):
                first = _before_backward_of(first, backward.begin)
            else:
                first = replace(first, gate_N=_before_backward_of(first.gate_N, backward.begin))
            forward.end()
            return first, *others

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def _tick(self) -> None:
        """What ran until now was the innermost range."""
        part = self._open[-1].part if self._open else "rest"
        if self.on_cuda:
            self._events.append((part, _event()))
        else:
            now = time.perf_counter()
            self._seconds[part] += now - self._last
            self._last = now

    def _settle(self) -> None:
        """Adds up the time between events that the stream has passed."""
        done = 0
        for (_, before), (part, event) in zip(self._events, self._events[1:], strict=False):
            if not event.query():
                break
            if part:
                self._seconds[part] += before.elapsed_time(event) / 1e3
            done += 1
        del self._events[:done]


class _Range:
    """One passage through a range."""

    def __init__(self, clock: StepTimer, part: str, name: str) -> None:
        self.clock, self.part, self.name = clock, part, name
        self.told: record_function | None = None

    def begin(self) -> None:
        if self.clock.running:
            self.clock._tick()
            self.clock._open.append(self)
            if self.clock.annotate_profile:
                self.told = record_function(self.name)
                self.told.__enter__()

    def end(self) -> None:
        """With what began within it and found no end, where no gradient came by. It may itself never have begun."""
        if self in self.clock._open:
            self.clock._tick()
            while (last := self.clock._open.pop()) is not self:
                last.leave()
            self.leave()

    def leave(self) -> None:
        if self.told:
            self.told.__exit__(None, None, None)


def _before_backward_of(x: torch.Tensor, do: Callable[[], None]) -> torch.Tensor:
    """`x`; `do` is called when its gradient is whole. Without a gradient, never."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x
    x = x.view_as(x)
    assert x.grad_fn is not None
    x.grad_fn.register_prehook(lambda gradients: do())
    return x


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
