"""The short-long convolution: local detail first, then one kernel as long as the sequence."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from chela.layers.long_kernel import BranchedKernel, FoldedKernel, KernelKind
from chela.layers.padding import check_mask, zero_padding
from chela.ops import long_conv, long_conv_online_state, long_conv_step, short_conv, short_conv_step
from chela.ops.impl import Impl
from chela.ops.long_conv.online import OnlineState
from chela.ops.precision import product_dtype


class ShortLongState(NamedTuple):
    """What the convolutions keep of the past."""

    short: Float[Tensor, "b w d"] | None
    """Last W-1 inputs of the short convolution; None without that stage."""
    long: Float[Tensor, "b s d"] | OnlineState | None
    """Last inputs of the long convolution, at most L-1, or its online state; None without that stage."""


class ShortLongConv(nn.Module):
    """Depthwise `long_conv(SiLU(short_conv(x)))` whose long kernel is a sum of branches that folds (CHELA, section 3).

    Args:
        d_model: channels D.
        kernel_length: taps L of the long stage; 0 leaves the stage out.
        short_width: taps W of the short stage; 0 leaves the stage and its SiLU out.
        causal: past only; otherwise both stages look both ways.
        kernel: "dense" (a parameter a lag) or "multiscale" (equally many an octave of lags).
        taps_per_octave: parameters an octave, for "multiscale".
        branches: widths of the short branches beside the long kernel.
        branch_norm: batch norm on each branch (one convolution a branch while training).
        squash: soft threshold on the long branch's taps.
        tap_dropout: share of the long branch's taps dropped while training.

    Raises:
        ValueError: a width, length or share out of its range, or an unknown kernel.
    """

    def __init__(
        self,
        d_model: int,
        *,
        kernel_length: int,
        short_width: int = 4,
        causal: bool = True,
        kernel: KernelKind = "dense",
        taps_per_octave: int = 16,
        branches: tuple[int, ...] = (7, 31),
        branch_norm: bool = False,
        squash: float = 0.0,
        tap_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("kernel_length", kernel_length), ("short_width", short_width)):
            if value < 0:
                raise ValueError(f"{name} must not be negative (0 leaves the stage out); got {value}")
        self.d_model, self.causal, self.kernel_length = d_model, causal, kernel_length
        if short_width > 0:
            bound = short_width**-0.5
            self.short_weight = nn.Parameter(torch.empty(d_model, short_width).uniform_(-bound, bound))
            self.short_bias = nn.Parameter(torch.zeros(d_model))
        else:
            self.short_weight = self.short_bias = None
        self.kernel: BranchedKernel | FoldedKernel | None = None
        if kernel_length > 0:
            self.kernel = BranchedKernel(
                d_model,
                kernel_length,
                causal=causal,
                kind=kernel,
                taps_per_octave=taps_per_octave,
                branches=branches,
                branch_norm=branch_norm,
                squash=squash,
                tap_dropout=tap_dropout,
            )

    def merge(self) -> "ShortLongConv":
        """Fold the branches into one kernel, in place; evaluation gives the same numbers to rounding.

        Returns:
            This module. Its `kernel` parameters are replaced, so an optimiser made before must be made anew.
        """
        if isinstance(self.kernel, BranchedKernel):
            was_training = self.training
            self.eval()  # tap dropout off, running statistics in
            self.kernel = FoldedKernel(self.kernel())
            self.train(was_training)
        return self

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        *,
        mask: Bool[Tensor, "b t"] | None = None,
        state: ShortLongState | None = None,
        return_state: bool = False,
        cu_seqlens: Int[Tensor, " n_plus_1"] | None = None,
        impl: Impl = "auto",
    ) -> tuple[Float[Tensor, "b t d"], ShortLongState | None]:
        """Convolve `x` [B, T, D].

        Args:
            x: input.
            mask: True at real tokens; padding reads as the zeros beyond the ends of a sequence.
            state: what an earlier call returned (causal only).
            return_state: also return the state after the last position (with a mask: padding must be on the left).
                With T = 1 an online state (`online`) is changed in place and returned; from longer x comes a plain one.
            cu_seqlens: int32 [N+1], document boundaries of a packed batch with B = 1 (causal only).
            impl: implementation of the ops.

        Returns:
            Output [B, T, D] (arbitrary at padding) and the state, or None.

        Raises:
            ValueError: a mask of another shape or type, or together with state; a state given or asked for while
                branch norm is in training; or what the ops refuse.
        """
        check_mask(mask, x, state)
        before = state or ShortLongState(None, None)
        carry = {"causal": self.causal, "return_state": return_state, "cu_seqlens": cu_seqlens, "impl": impl}
        after_short = after_long = None
        u = zero_padding(x.to(product_dtype(x)), mask)
        if self.short_weight is not None:
            weight, bias = self.short_weight.to(u.dtype), self.short_bias
            if before.short is not None and is_step(x, return_state):
                u, after_short = short_conv_step(
                    u.squeeze(1), weight, bias, state=before.short, activation="silu", impl=impl
                )
                u = u.unsqueeze(1)
            else:
                u, after_short = short_conv(u, weight, bias, activation="silu", state=before.short, **carry)
            u = zero_padding(u, mask)  # the bias made padding non-zero
        z = u
        if self.kernel is not None:
            if isinstance(self.kernel, BranchedKernel) and self.kernel.norms is not None and self.training:
                z = self._normed_branches(self.kernel, u, mask, before, return_state, cu_seqlens, impl)
            else:
                taps, past = self.kernel(), before.long
                if isinstance(past, OnlineState) and return_state and u.shape[1] == 1:
                    z, after_long = long_conv_step(u.squeeze(1), taps.forward, state=past, impl=impl)
                    z = z.unsqueeze(1)
                else:
                    past = past.last_inputs() if isinstance(past, OnlineState) else past
                    z, after_long = long_conv(u, taps.forward, reverse_kernel=taps.reverse, state=past, **carry)
                if taps.bias is not None:
                    z = z + taps.bias.to(z.dtype)
        return z, ShortLongState(after_short, after_long) if return_state else None

    def online(self, state: ShortLongState) -> ShortLongState:
        """Make a state ready for many steps: the long stage then costs O(log^2 L) a token (`long_conv_online_state`).

        Raises:
            ValueError: the branches are not merged, so that every step would fold L taps.
        """
        if self.kernel is None or state.long is None or isinstance(state.long, OnlineState):
            return state
        if not isinstance(self.kernel, FoldedKernel):
            raise ValueError("online steps need one kernel: merge() the model first")
        return state._replace(long=long_conv_online_state(state.long, self.kernel().forward))

    def _normed_branches(
        self,
        kernel: BranchedKernel,
        u: Tensor,
        mask: Tensor | None,
        before: ShortLongState,
        return_state: bool,
        cu_seqlens: Tensor | None,
        impl: Impl,
    ) -> Tensor:
        """Each branch through its own convolution and batch norm: its statistics are not known before."""
        if return_state or before.long is not None:
            raise ValueError(
                "no state is taken or given while branch norm trains, for its statistics are of whole sequences: leave "
                "state and return_state out to train, call eval() to step or prefill, or build the layer with "
                "branch_norm=False to train on a state"
            )
        assert kernel.norms is not None
        total = torch.zeros_like(u)
        for index, norm in enumerate(kernel.norms):
            taps = kernel.branch(index)
            branch, _ = long_conv(
                u,
                taps.forward,
                reverse_kernel=taps.reverse,
                causal=self.causal,
                cu_seqlens=cu_seqlens,
                impl=impl,
            )
            total = total + norm(branch, mask)
        return total


def is_step(x: Tensor, return_state: bool) -> bool:
    """Whether a piece is a single token on the way, for which the ops have steps of their own, and no gradient."""
    return return_state and x.shape[1] == 1 and not torch.is_grad_enabled()
