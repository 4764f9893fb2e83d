"""The two ways of applying a residual left @ right to a frozen linear layer, each with a backward pass of its own.

`factored`: y = x W^T + (x right^T) left^T. `dense`: y = x (W + left right)^T, one product as in the frozen layer.
Both give the same gradients with skinny products only; neither ever forms a gradient of W's shape, which would cost as
much as fully fine-tuning the layer. T tokens, N out_features, d rank: the extra work is 2 T d (d_in + N) forward and
twice that backward for `factored`, and 2 N d d_in forward and 2 T d (2 d_in + 2 N) backward for `dense`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

DENSE_FROM = 1.0  # tokens per out_feature from which forming W + dW pays, see `dense_is_faster`


@dataclass
class LayerFactors:
    """Factors of the sum of the residuals of one layer, scaling included.

    Attributes:
        left: (out_features, total rank of the adapters).
        right: (total rank, in_features).
        reusable: Whether the factors are kept for further forward passes.
        dense: W + dW, formed on first use where that pays.
    """

    left: Float[Tensor, "out_features rank"]
    right: Float[Tensor, "rank in_features"]
    reusable: bool = False
    dense: Tensor | None = None

    def detached(self) -> "LayerFactors":
        """Return the same values as leaves of the graph, which need gradients where these do."""
        return LayerFactors(
            self.left.detach().requires_grad_(self.left.requires_grad),
            self.right.detach().requires_grad_(self.right.requires_grad),
        )

    def refusing_gradients(self) -> "LayerFactors":
        """Return these leaves, for a recomputation that only compares what was saved: gradients would be lost."""

        def refuse(_: Tensor) -> None:
            raise RuntimeError(
                "A checkpointed region was recomputed after another forward pass with gradients, and gradients of the "
                "generator would be lost. Call backward() before the next forward, or use non-reentrant checkpointing: "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )

        for factor in (self.left, self.right):
            if factor.requires_grad:
                factor.register_hook(refuse)
        return self


def sum_of_residuals(pieces: Sequence[tuple[Tensor, Tensor]]) -> LayerFactors:
    """Return the factors of the sum of several residuals: their factors side by side."""
    if len(pieces) == 1:
        return LayerFactors(*pieces[0])
    lefts, rights = zip(*pieces, strict=True)
    return LayerFactors(torch.cat(lefts, dim=1), torch.cat(rights, dim=0))


class _Factored(torch.autograd.Function):
    """Frozen product plus low-rank product, the second accumulated into the first's output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, left, right)
        output = functional.linear(x, weight, bias)
        output.view(-1, output.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]) @ right.T, left.T)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, gradients[0])


class _Dense(torch.autograd.Function):
    """One product with W + left right; the sum is not kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, left, right)
        return functional.linear(x, torch.addmm(weight, left, right), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, gradients[0])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of y = x (W + left right)^T with respect to x, left and right; x right^T is made anew, not kept."""
    x, weight, left, right = ctx.saved_tensors
    x_needed, _, bias_needed, left_needed, right_needed = ctx.needs_input_grad
    flat_x, flat_gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    reduced = flat_gradient @ left  # [tokens, rank]
    grad_x = (flat_gradient @ weight).addmm_(reduced, right).view(x.shape) if x_needed else None
    grad_bias = flat_gradient.sum(0) if bias_needed else None
    grad_left = flat_gradient.T @ (flat_x @ right.T) if left_needed else None
    grad_right = reduced.T @ flat_x if right_needed else None
    return grad_x, None, grad_bias, grad_left, grad_right


def adapted_linear(
    x: Float[Tensor, "*axes in_features"],
    weight: Float[Tensor, "out_features in_features"],
    bias: Float[Tensor, " out_features"] | None,
    left: Float[Tensor, "out_features rank"],
    right: Float[Tensor, "rank in_features"],
    dense: bool,
) -> Float[Tensor, "*axes out_features"]:
    """Return x (weight + left right)^T + bias, with gradients for everything but `weight`.

    Args:
        x: Input of the layer.
        weight: Frozen weight; its own gradient is never formed.
        bias: Bias of the layer, or None.
        left: Left factor of the residual, in the dtype of `weight`.
        right: Right factor of the residual, in the dtype of `weight`.
        dense: Whether to add the residual to the weight first; otherwise the products stay skinny.
    """
    product = _Dense if dense else _Factored
    return product.apply(x, weight, bias, left, right)  # type: ignore[return-value]


def dense_is_faster(tokens: int, out_features: int) -> bool:
    """Return whether `dense` beats `factored` in a training step, for `tokens` rows of input.

    Adding the residual to the weight costs the same for any batch; what it saves grows with the tokens. The
    break-even was measured, not counted: with this rule none of 72 sizes took over 2 % more than the better way
    (benchmarks/layer.py --sweep; results/dense_rule.json).
    """
    return tokens >= DENSE_FROM * out_features
