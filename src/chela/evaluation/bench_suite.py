"""What a suite of `chela bench` is made of: who takes part, and the job, its inputs and its shapes."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = dict[str, int]
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to do a job."""

    name: str
    run: Callable[..., Tensor]
    """From inputs to the output."""
    impl: str = ""
    """Which implementation of ours; empty for a peer."""
    prepare: Callable[[Inputs, Shape], Inputs] = lambda inputs, shape: inputs
    """Puts the suite's inputs into the layout and under the names that `run` wants; not timed."""
    longest: Callable[[str], int] = lambda device: 2**62
    """Largest T worth waiting for on a kind of device."""
    only: tuple[Shape, ...] = ()
    """The only shapes worth waiting for; none for all."""
    package: str = "torch"
    """What must be installed; imported when the contender first runs."""

    def takes(self, shape: Shape, device: torch.device) -> bool:
        """Whether a shape is worth waiting for."""
        return shape["T"] <= self.longest(device.type) and (not self.only or shape in self.only)

    def missing(self) -> bool:
        """Whether the package is not installed."""
        return importlib.util.find_spec(self.package) is None


@dataclass(frozen=True)
class Suite:
    """One op and all who do its job."""

    op: str
    uses: tuple[str, ...]
    """The ops of ours that it calls."""
    make: Callable[..., Inputs]
    """Random inputs of a shape, with the options of `random_inputs.draw`; gradients are taken with respect to all."""
    plain: Callable[..., Tensor]
    """The plain implementation that the checks hold ours to."""
    contenders: tuple[Contender, ...]
    shapes: dict[str, tuple[Shape, ...]]
    """For each kind of device."""
    check: Shape
    """A small, odd shape for the checks."""
    gradients: bool = True
    """Whether the op has any; the checks hold them too."""
    backward: bool = True
    """Whether the backward pass is timed."""
    floor: bool = True
    """Whether all the op must read and write are the inputs and the output, so that a copy's speed is its limit."""
    flat: bool = False
    """Whether all shapes have as many tokens, so that the time of one should not depend on the length; the bench says
    how far it does."""
    tokens: Callable[[Shape], int] = lambda shape: shape["B"] * shape["T"]
    """Tokens that one time is given for."""
    steps: Callable[[Tensor], int] = lambda out: 1
    """How many times of the table a run took, by its output: a run of many tokens, one by one, gives the mean."""
