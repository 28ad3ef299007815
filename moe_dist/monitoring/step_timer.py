"""Timing of a training step by part, in forward and in backward, with named ranges for a profile.

The innermost open range is the running part; time outside all ranges is "rest", so the parts of a
step add up to the step. Each part comprises its forward, its backward, and recomputation within its
backward:

  gate       scores, noise, selection and capacity; in hierarchical layers also the groups' gates
  dispatch   tokens and weights to the experts and back: counts, sorting, copies, collectives, and
             waiting there for slower ranks
  experts    the experts' computation and copies, and their weight gradients on this rank
  optimizer  gradient reduction for experts and row-sparse matrices, gradient norm, update, and
             ZeRO's work around it
  rest       everything else: data, other layers, loss with its reductions, dense gradients that
             ZeRO reduces within backward

Autograd runs ready nodes in the reverse order of their creation. The backward of a range is
therefore the time between two views: one around its first output, which is created last, and one
around its first argument, which is created first.

On CUDA a range ends with an event on the stream. Events are read once the stream has passed them,
so a step never waits for them.
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

from moe_dist.monitoring.metric_keys import PARTS


class StepTimer:
    """A timer of one rank. Ranges are timed only within `step`; elsewhere they cost nothing.

    Attributes:
        on_cuda: True if CUDA events are used instead of the host's clock.
        running: True while a step is timed.
        annotate_profile: True if ranges also become ranges of torch's profiler.
    """

    def __init__(self, device: torch.device) -> None:
        """Creates a timer for steps on `device`."""
        self.on_cuda = device.type == "cuda"
        self.running = False
        self.annotate_profile = False
        self._open: list[_Range] = []
        self._forwards: list[tuple[nn.Module, _Range, _Range | None]] = []  # running
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._last = 0.0  # time at which the last range began or ended
        # (part that ended with the event, event); the part is "" at the beginning of a step
        self._events: list[tuple[str, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Context manager: times its block as one step."""
        self._settle()
        self._open.clear()
        self._forwards.clear()
        self._last = time.perf_counter()
        self.running = True
        if self.on_cuda:
            self._events.append(("", _event()))
        try:
            yield
        finally:
            self._tick()
            self.running = False

    def read_and_reset(self) -> dict[str, float]:
        """Returns the seconds of each part, summed over the steps since the last call.

        On CUDA it waits until the stream has finished the last step.
        """
        if self._events:
            self._events[-1][1].synchronize()
        self._settle()
        seconds, self._seconds = self._seconds, defaultdict(float)
        return {part: seconds[part] for part in PARTS}

    @contextlib.contextmanager
    def range(self, part: str, name: str = "") -> Iterator[None]:
        """Context manager: times its block, which must have no backward, as a range.

        Args:
            part: One of PARTS.
            name: Name of the range in a profile; the part's name if empty.
        """
        if not self.running:
            yield
            return
        current = _Range(self, part, name or part)
        current.begin()
        try:
            yield
        finally:
            current.end()

    def attach(self, module: nn.Module, part: str, name: str) -> None:
        """Times every forward of a module, and its backward, by forward hooks.

        Args:
            module: Its forward takes a tensor as the first positional argument and returns a tuple.
                The tuple's first element is a tensor, or a dataclass with the differentiable tensor
                `gate_N` (`moe.routing.Routing`). A call with keywords alone is not timed.
            part: One of PARTS.
            name: Name of the range in a profile.
        """

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not self.running or not args:
                return None
            forward = _Range(self, part, name)
            forward.begin()
            x, *others = args
            backward = None
            if x.requires_grad:  # otherwise nothing marks the end of its backward
                backward = _Range(self, part, f"{name} (backward)")
                x = _before_backward_of(x, backward.end)
            self._forwards.append((module, forward, backward))
            return x, *others

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> tuple[Any, ...] | None:
            if all(entry[0] is not module for entry in self._forwards):
                return None  # the timer was not running when this forward began
            while (entry := self._forwards.pop())[0] is not module:
                pass  # a forward inside this one that ended with an exception
            _, forward, backward = entry
            if output is None:  # this forward ended with an exception
                forward.end()
                return None
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
        module.register_forward_hook(after, always_call=True)

    def _tick(self) -> None:
        """Adds the time since the last tick to the innermost open range."""
        part = self._open[-1].part if self._open else "rest"
        if self.on_cuda:
            self._events.append((part, _event()))
        else:
            now = time.perf_counter()
            self._seconds[part] += now - self._last
            self._last = now

    def _settle(self) -> None:
        """Adds the times between events that the stream has passed, and drops those events."""
        done = 0
        for (_, before), (part, event) in zip(self._events, self._events[1:], strict=False):
            if not event.query():
                break
            if part:
                self._seconds[part] += before.elapsed_time(event) / 1e3
            done += 1
        del self._events[:done]


class _Range:
    """One forward or backward pass through a range."""

    def __init__(self, timer: StepTimer, part: str, name: str) -> None:
        self.timer = timer
        self.part = part
        self.name = name
        self.profiled: record_function | None = None

    def begin(self) -> None:
        if self.timer.running:
            self.timer._tick()
            self.timer._open.append(self)
            if self.timer.annotate_profile:
                self.profiled = record_function(self.name)
                self.profiled.__enter__()

    def end(self) -> None:
        """Ends the range, and the ranges inside it whose end no gradient reached.

        It does nothing if the range was never started.
        """
        if self in self.timer._open:
            self.timer._tick()
            while (last := self.timer._open.pop()) is not self:
                last.leave()
            self.leave()

    def leave(self) -> None:
        if self.profiled:
            self.profiled.__exit__(None, None, None)


# Autograd runs ready nodes in reverse creation order, so the prehook of a view marks the beginning
# or the end of a range in backward. Tried with torch 2.13. Held by
# test_step_timer.py::test_each_part_has_forward_and_backward_time.
def _before_backward_of(x: torch.Tensor, do: Callable[[], None]) -> torch.Tensor:
    """Returns a view of `x`; `do` is called once its gradient is complete (never without one)."""
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
