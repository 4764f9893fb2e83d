"""Attention from tokens to a few learned clusters, and the norms around it.

The same class is the Parameter-to-Cluster attention of GIFT (tokens are rows of a weight; sigmoid assignment,
l2 norm) and the Patch-to-Cluster attention of PaCa-ViTs (tokens are patches; softmax over the tokens, layer norm).

Glossary (symbol: word): X: tokens, C: assignment, Z: cluster tokens, N: number of tokens, M: clusters, d: channels.
Sources: PaCa-ViT (arXiv 2203.11987), GIFT (arXiv 2312.00700, first version).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from gift.tuner.options import ASSIGNMENTS, NORMS, check_choice, check_heads

LOGIT_BOUND = 0.1  # with unit tokens and gain 1, no assignment logit starts beyond this: |sigmoid - 1/2| <= 0.025
INITIAL_STD = 0.02  # of the linear maps inside a block: small, so that a block starts close to the identity


class L2Norm(nn.Module):
    """Scale every token to unit l2 norm; there is nothing to learn."""

    def forward(self, tokens: Float[Tensor, "*axes channels"]) -> Float[Tensor, "*axes channels"]:
        """Return the tokens with unit norm over the last axis; an all-zero token stays zero."""
        return functional.normalize(tokens, dim=-1)


def make_norm(name: str, channels: int) -> nn.Module:
    """Return the norm called `name`: `l2` (no affine), `layer` (LayerNorm with affine) or `none`.

    Raises:
        ValueError: If there is no norm of that name.
    """
    check_choice("norm", name, NORMS)
    if name == "l2":
        return L2Norm()
    return nn.LayerNorm(channels) if name == "layer" else nn.Identity()


def initial_linear(in_features: int, out_features: int) -> nn.Linear:
    """Return a linear layer with small normal weights and zero bias, as the blocks start from."""
    linear = nn.Linear(in_features, out_features)
    nn.init.normal_(linear.weight, std=INITIAL_STD)
    nn.init.zeros_(linear.bias)
    return linear


class ClusterAttention(nn.Module):
    """Multi-head attention whose queries are the tokens and whose keys and values are clusters of the tokens.

    With the assignment C of N tokens to M clusters, the cluster tokens are Z = norm(C^T X / N) for `sigmoid` and
    Z = norm(C^T X) for `softmax` (each cluster's assignment sums to one over the tokens). Cost O(N M), not O(N^2).

    Args:
        channels: Width d of a token.
        clusters: Number of clusters M.
        heads: Number of attention heads; must divide `channels`.
        assignment: Activation of the assignment logits: `sigmoid`, or `softmax` over the tokens.
        norm: Norm of the cluster tokens: `l2`, `layer` or `none`.
        gain: Factor on the assignment logits.
        learn_gain: Whether that factor is trained, starting from `gain`.

    Raises:
        ValueError: If `heads` does not divide `channels`, or a name is unknown.
    """

    def __init__(
        self,
        channels: int,
        clusters: int,
        heads: int = 1,
        assignment: str = "sigmoid",
        norm: str = "l2",
        gain: float | int = 1.0,
        learn_gain: bool = False,
    ) -> None:
        super().__init__()
        check_heads(channels, heads)
        check_choice("assignment", assignment, ASSIGNMENTS)
        self.heads = heads
        self.assignment = assignment
        self.cluster = nn.Linear(channels, clusters)
        self.query = initial_linear(channels, channels)
        self.key = initial_linear(channels, channels)
        self.value = initial_linear(channels, channels)
        self.project = initial_linear(channels, channels)
        self.norm = make_norm(norm, channels)
        self.gain = nn.Parameter(torch.full((1,), float(gain))) if learn_gain else float(gain)
        self._bound_logits()

    @torch.no_grad()
    def _bound_logits(self) -> None:
        """Draw the assignment in random directions of one length, so that unit tokens give bounded logits."""
        nn.init.normal_(self.cluster.weight)
        self.cluster.weight.copy_(LOGIT_BOUND * functional.normalize(self.cluster.weight, dim=-1))
        nn.init.zeros_(self.cluster.bias)

    def assign(self, tokens: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch tokens clusters"]:
        """Return how much every token belongs to every cluster."""
        logits = self.gain * self.cluster(tokens)
        return torch.sigmoid(logits) if self.assignment == "sigmoid" else logits.softmax(dim=1)

    def forward(
        self, tokens: Float[Tensor, "batch tokens channels"]
    ) -> tuple[Float[Tensor, "batch tokens channels"], Float[Tensor, "batch tokens clusters"]]:
        """Return the attended tokens (without residual connection) and the assignment they were made with."""
        assignment = self.assign(tokens)
        clusters = assignment.transpose(1, 2) @ tokens
        clusters = self.norm(clusters / tokens.shape[1] if self.assignment == "sigmoid" else clusters)
        attended = functional.scaled_dot_product_attention(
            split_heads(self.query(tokens), self.heads),
            split_heads(self.key(clusters), self.heads),
            split_heads(self.value(clusters), self.heads),
        )
        return self.project(merge_heads(attended)), assignment


class SelfAttention(nn.Module):
    """Plain multi-head self-attention over the tokens, the quadratic counterpart of `ClusterAttention`.

    Args:
        channels: Width d of a token.
        heads: Number of attention heads; must divide `channels`.

    Raises:
        ValueError: If `heads` does not divide `channels`.
    """

    def __init__(self, channels: int, heads: int = 1) -> None:
        super().__init__()
        check_heads(channels, heads)
        self.heads = heads
        self.query = initial_linear(channels, channels)
        self.key = initial_linear(channels, channels)
        self.value = initial_linear(channels, channels)
        self.project = initial_linear(channels, channels)

    def forward(
        self, tokens: Float[Tensor, "batch tokens channels"]
    ) -> tuple[Float[Tensor, "batch tokens channels"], None]:
        """Return the attended tokens (without residual connection); there is no assignment."""
        attended = functional.scaled_dot_product_attention(
            split_heads(self.query(tokens), self.heads),
            split_heads(self.key(tokens), self.heads),
            split_heads(self.value(tokens), self.heads),
        )
        return self.project(merge_heads(attended)), None


def split_heads(
    tokens: Float[Tensor, "batch tokens channels"], heads: int
) -> Float[Tensor, "batch {heads} tokens head_channels"]:
    """Return the channels split into heads, the heads before the tokens."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(
    tokens: Float[Tensor, "batch heads tokens head_channels"],
) -> Float[Tensor, "batch tokens channels"]:
    """Return the heads laid back side by side into the channels."""
    return tokens.transpose(1, 2).flatten(2)
