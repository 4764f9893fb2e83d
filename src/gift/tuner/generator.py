"""The hyper-Transformer: frozen weights in, low-rank residuals and cluster assignments out.

Every row of a frozen weight W (N, d_in) is a *parameter token*. It is reduced to d channels, passed through a few
blocks, and recovered to d_in channels. The recovery is linear, so the residual is a product of one *left factor* per
layer and one *right factor* shared by all of them:

    X = W reduce^T (+ bias) + position;   X <- block(X), repeated;   dW = X recover = left right

Glossary (symbol: word): L: layers, N: out_features (parameter tokens), d_in: in_features, d: rank, M: clusters,
l: blocks, W: weight, dW: residual, H: left factor, R: right factor, C: assignment.
Source: GIFT (arXiv 2312.00700), first version for the blocks, later versions for the `linear` generator.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from gift.tuner.attention import ClusterAttention, SelfAttention, initial_linear, make_norm
from gift.tuner.options import GeneratorOptions

ROWS_AT_ONCE = 256  # of a weight in another dtype, on a CPU
INITIAL_POSITION = 0.1  # sin-cos positions start at this share of the tokens' root mean square


@runtime_checkable
class ReducibleWeight(Protocol):
    """A frozen weight that is no matrix in memory: quantised, or sharded over processes."""

    @property
    def shape(self) -> torch.Size:
        """Rows and columns."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it is."""
        ...

    def times(self, matrix: Float[Tensor, "rank in_features"]) -> Float[Tensor, "out_features rank"]:
        """Return weight @ matrix^T in the matrix's dtype."""
        ...


class Factors(NamedTuple):
    """The residuals of the layers one generator serves, and how their parameter tokens were clustered.

    Attributes:
        left: Left factor of every layer, (out_features, rank); one more column of ones if the recovery has a bias.
        right: Right factor shared by all layers, (rank, in_features); one more row if the recovery has a bias.
        assignments: For every layer the assignment of every block, (out_features, clusters); no block has one in
            generators without clusters.
    """

    left: tuple[Float[Tensor, "_ rank"], ...]
    right: Float[Tensor, "rank in_features"]
    assignments: tuple[tuple[Float[Tensor, "_ clusters"], ...], ...]


def activate(values: Float[Tensor, "*axes"], name: str) -> Float[Tensor, "*axes"]:
    """Return the values after the activation called `name`; GELU is the exact one."""
    if name == "identity":
        return values
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": functional.gelu,
        "relu": functional.relu,
        "silu": functional.silu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
    }
    return functions[name](values)


class FeedForward(nn.Module):
    """Two linear maps with an activation between them, over the last axis.

    Args:
        channels: Width of the input and of the output.
        hidden: Width in between.
        activation: Name of the activation.
    """

    def __init__(self, channels: int, hidden: int, activation: str = "gelu") -> None:
        super().__init__()
        self.activation = activation
        self.expand = initial_linear(channels, hidden)
        self.contract = initial_linear(hidden, channels)

    def forward(self, tokens: Float[Tensor, "*axes channels"]) -> Float[Tensor, "*axes channels"]:
        """Return the transformed tokens, without residual connection."""
        return self.contract(activate(self.expand(tokens), self.activation))


class TokenMixer(nn.Module):
    """A feed-forward network along the tokens, the same for every channel (MLP-Mixer).

    Args:
        tokens: Number N of tokens; fixed, since the weights depend on it.
        hidden: Absolute width in between.
        activation: Name of the activation.
    """

    def __init__(self, tokens: int, hidden: int, activation: str = "gelu") -> None:
        super().__init__()
        self.feed_forward = FeedForward(tokens, hidden, activation)

    def forward(
        self, tokens: Float[Tensor, "batch tokens channels"]
    ) -> tuple[Float[Tensor, "batch tokens channels"], None]:
        """Return the mixed tokens, without residual connection; there is no assignment."""
        return self.feed_forward(tokens.transpose(1, 2)).transpose(1, 2), None


class Block(nn.Module):
    """Pre-norm residual block: tokens look at each other (`mixing`), then every token by itself (`feed_forward`).

    Args:
        options: Width of a token, norm, and size of the feed-forward part (ratio 0 leaves it out).
        mixing: Module returning (tokens, assignment or None), or None to leave the step out.
    """

    def __init__(self, options: GeneratorOptions, mixing: nn.Module | None) -> None:
        super().__init__()
        channels, norm, hidden = options.r, options.norm, int(options.r * options.mlp_ratio)
        self.mixing = mixing
        self.mixing_norm = make_norm(norm, channels) if mixing is not None else None
        self.feed_forward = FeedForward(channels, hidden, options.activation or "gelu") if hidden else None
        self.feed_forward_norm = make_norm(norm, channels) if hidden else None

    def forward(
        self, tokens: Float[Tensor, "batch tokens channels"]
    ) -> tuple[Float[Tensor, "batch tokens channels"], Float[Tensor, "batch tokens clusters"] | None]:
        """Return the new tokens and the assignment of this block, None where it has no clusters."""
        assignment = None
        if self.mixing is not None and self.mixing_norm is not None:
            mixed, assignment = self.mixing(self.mixing_norm(tokens))
            tokens = tokens + mixed
        if self.feed_forward is not None and self.feed_forward_norm is not None:
            tokens = tokens + self.feed_forward(self.feed_forward_norm(tokens))
        return tokens, assignment


def _cluster_attention(options: GeneratorOptions, tokens: int) -> nn.Module:
    return ClusterAttention(
        options.r,
        options.num_clusters,
        heads=options.num_heads,
        assignment=options.assignment,
        gain=options.assignment_gain,
        learn_gain=options.learn_assignment_gain,
    )


def _self_attention(options: GeneratorOptions, tokens: int) -> nn.Module:
    return SelfAttention(options.r, options.num_heads)


def _token_mixer(options: GeneratorOptions, tokens: int) -> nn.Module:
    return TokenMixer(tokens, options.num_mixed_tokens, options.activation or "gelu")


def _no_mixing(options: GeneratorOptions, tokens: int) -> None:
    return None


# How the parameter tokens of a layer look at each other; `linear` has no blocks at all.
MIXINGS: dict[str, Callable[[GeneratorOptions, int], nn.Module | None]] = {
    "paca": _cluster_attention,
    "transformer": _self_attention,
    "mlp": _no_mixing,
    "mixer": _token_mixer,
}


class WeightGenerator(nn.Module):
    """Generate the residual of every linear layer that shares one input width.

    The residual is exactly zero at the start, because `recover` is. In the `linear` generator, without blocks and
    position, dW = W phi psi, and its assignment is the reduced weight itself (M = d).

    Args:
        in_features: Input width of the target layers.
        out_features: Output width of the target layers; only `mixer` and learned positions bind it.
        options: Kind, sizes and start of the generator.
    """

    def __init__(self, in_features: int, out_features: int, options: GeneratorOptions) -> None:
        super().__init__()
        self.options = options
        self.bound_tokens = out_features if options.binds_tokens else None
        self.reduce = nn.Linear(in_features, options.r, bias=options.reduce_bias)
        with torch.no_grad():
            self.reduce.weight.mul_(options.init_scale)
        self.position = self._make_position(out_features)
        self.blocks = nn.ModuleList(self._make_block(out_features) for _ in range(self._number_of_blocks()))
        self.recover = nn.Parameter(torch.zeros(options.r, in_features))
        self.recover_bias = nn.Parameter(torch.zeros(in_features)) if options.recover_bias else None

    @property
    def is_input_map(self) -> bool:
        """Whether dW = W phi psi with nothing in between, so that it can be applied to a layer's input instead.

        Not where FSDP2 shards this generator as a unit: it gathers parameters only when `forward` is called.
        """
        options = self.options
        plain = options.generator == "linear" and options.activation == "identity"
        return plain and self.reduce.bias is None and self.recover_bias is None and not isinstance(self, FSDPModule)

    def _number_of_blocks(self) -> int:
        return 0 if self.options.generator == "linear" else self.options.num_blocks

    def _make_block(self, out_features: int) -> Block:
        return Block(self.options, MIXINGS[self.options.generator](self.options, out_features))

    def _make_position(self, out_features: int) -> nn.Parameter | None:
        """Return the gain of the sin-cos table, or the learned table, which starts at zero."""
        if self.options.position == "sincos":
            return nn.Parameter(torch.zeros(1))
        if self.options.position == "learned":
            return nn.Parameter(torch.zeros(out_features, self.options.r))
        return None

    @torch.no_grad()
    def calibrate(self, weights: Sequence[Float[Tensor, "_ in_features"] | ReducibleWeight]) -> None:
        """Set the gain of the sin-cos positions to a tenth of the reduced weights' root mean square."""
        if self.options.position != "sincos" or self.position is None:
            return
        squares = [self._reduce(weight).square().mean() for weight in weights]
        self.position.copy_(INITIAL_POSITION * torch.stack(squares).mean().sqrt())

    def _reduce(
        self, weight: Float[Tensor, "out_features in_features"] | ReducibleWeight
    ) -> Float[Tensor, "out_features rank"]:
        """Return the parameter tokens of one weight, on the generator's own device and in its dtype."""
        matrix = self.reduce.weight.to(weight.device)
        tokens = reduce_weight(weight, matrix).to(self.reduce.weight.device)
        return tokens if self.reduce.bias is None else tokens + self.reduce.bias

    def _positions(self, tokens: int) -> Tensor | None:
        if self.position is None or self.options.position == "learned":
            return self.position
        table = sincos_table if torch.compiler.is_compiling() else _kept_sincos_table
        return self.position * table(tokens, self.options.r).to(self.position)

    def _tokens_to_left(
        self, tokens: Float[Tensor, "layers out_features rank"]
    ) -> tuple[Tensor, list[Float[Tensor, "layers out_features clusters"]]]:
        """Return the left factors and the assignment of every block for layers of one output width."""
        positions = self._positions(tokens.shape[1])
        tokens = tokens if positions is None else tokens + positions
        assignments = []
        if self.options.generator == "linear":
            tokens = activate(tokens, self.options.activation or "identity")
            assignments.append(tokens)
        for block in self.blocks:
            tokens, assignment = block(tokens)
            if assignment is not None:
                assignments.append(assignment)
        if self.recover_bias is not None:
            tokens = torch.cat([tokens, torch.ones_like(tokens[..., :1])], dim=-1)
        return tokens, assignments

    def forward(self, weights: Sequence[Float[Tensor, "_ in_features"] | ReducibleWeight]) -> Factors:
        """Return the factors of the residuals of all `weights` and the assignments of their rows.

        Each weight is reduced by itself and only the small tokens are stacked: no weight is ever copied. Layers of
        equal output width pass through the blocks as one batch. All of it is computed again in the backward pass, which
        costs little beside the layers and keeps no (layers, out_features, clusters) tensors (torch.compile decides
        about that itself).

        Args:
            weights: Frozen weight of every layer, each (out_features, in_features), any floating dtype and device.

        Raises:
            ValueError: If the generator is bound to another number of rows.
        """
        if torch.is_grad_enabled() and self.blocks and not torch.compiler.is_compiling():
            options: Any = {"use_reentrant": False, "preserve_rng_state": False}
            return checkpoint(self._generate_unchanged, self._versions(), tuple(weights), **options)
        return self._generate(weights)

    def _versions(self) -> list[int]:
        return [parameter._version for parameter in self.parameters()]

    def _generate_unchanged(
        self, versions: list[int], weights: Sequence[Float[Tensor, "_ in_features"] | ReducibleWeight]
    ) -> Factors:
        """Generate, and raise in the recomputation, as autograd would, if parameters were changed since the forward."""
        if versions != self._versions():
            raise RuntimeError(
                "A parameter of the generator was modified by an inplace operation between forward and backward, "
                "so the gradients would be wrong. Call backward() before optimizer.step()."
            )
        return self._generate(weights)

    def _generate(self, weights: Sequence[Float[Tensor, "_ in_features"] | ReducibleWeight]) -> Factors:
        tokens = [self._reduce(weight) for weight in weights]
        left = list(tokens)
        assignments: list[tuple[Tensor, ...]] = [()] * len(tokens)
        for out_features in dict.fromkeys(token.shape[0] for token in tokens):
            self._check_tokens(out_features)
            members = [index for index, token in enumerate(tokens) if token.shape[0] == out_features]
            batch_left, batch_assignments = self._tokens_to_left(torch.stack([tokens[index] for index in members]))
            # Not `batch_left[row]`, whose backward pass would make a zero tensor of the whole batch for every layer.
            for index, of_layer in zip(members, batch_left.unbind(), strict=True):
                left[index] = self._own(of_layer)
            for index, *of_layer in zip(
                members, *(assignment.unbind() for assignment in batch_assignments), strict=True
            ):
                assignments[index] = tuple(self._own(assignment) for assignment in of_layer)
        return Factors(tuple(left), self._right(), tuple(assignments))

    def _right(self) -> Float[Tensor, "rank in_features"]:
        if self.recover_bias is None:
            return self._own(self.recover)
        return torch.cat([self.recover, self.recover_bias[None]])

    def _own(self, tensor: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """Return a copy where FSDP2 shards this generator as a unit: it frees the parameters after the forward pass."""
        return tensor.clone() if isinstance(self, FSDPModule) else tensor

    def _check_tokens(self, out_features: int) -> None:
        if self.bound_tokens is not None and out_features != self.bound_tokens:
            raise ValueError(
                f"This generator ({self.options.generator}, position {self.options.position}) was made for weights "
                f"of {self.bound_tokens} rows, got {out_features}. Use one generator per shape."
            )


class _ReduceInOtherDtype(torch.autograd.Function):
    """The product weight @ matrix^T in the matrix's dtype, keeping the weight in its own for the backward pass.

    Autograd alone would hold a float32 copy of every bf16 weight until the backward pass. On a CPU the weight is
    converted a few rows at a time, which stay in the cache: four times faster for 4096 x 4096.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.cat([rows @ matrix.T for rows in _converted(weight, matrix.dtype)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (weight,), gradient = ctx.saved_tensors, gradients[0]
        total = gradient.new_zeros(gradient.shape[1], weight.shape[1])
        converted = _converted(weight, gradient.dtype)
        for of_rows, rows in zip(gradient.split(_rows_at_once(weight)), converted, strict=True):
            total = total.addmm_(of_rows.T, rows)
        return None, total


def _rows_at_once(weight: Tensor) -> int:
    return ROWS_AT_ONCE if weight.device.type == "cpu" else max(1, weight.shape[0])


def _converted(weight: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the rows of a weight in another dtype, a few at a time, each time in the same memory."""
    memory = weight.new_empty((min(_rows_at_once(weight), weight.shape[0]), weight.shape[1]), dtype=dtype)
    for rows in weight.split(_rows_at_once(weight)):
        # A second derivative, which may be taken where gradients are enabled here, needs them all at once.
        yield rows.to(dtype) if torch.is_grad_enabled() else memory[: len(rows)].copy_(rows)


def reduce_weight(
    weight: Float[Tensor, "out_features in_features"] | ReducibleWeight,
    matrix: Float[Tensor, "rank in_features"],
) -> Float[Tensor, "out_features rank"]:
    """Return weight @ matrix^T in the matrix's dtype; the weight is frozen and gets no gradient."""
    if not isinstance(weight, Tensor):
        return weight.times(matrix)
    if weight.dtype == matrix.dtype:
        return weight.detach() @ matrix.T
    return _ReduceInOtherDtype.apply(weight.detach(), matrix)  # type: ignore[return-value]


def sincos_table(tokens: int, channels: int) -> Float[Tensor, "{tokens} {channels}"]:
    """Return the fixed sin-cos encoding of the token index: sines in the first half of the channels, cosines after.

    The wavelengths run from 2 pi to 10000 * 2 pi ("Attention Is All You Need", section 3.5).
    """
    half = (channels + 1) // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :channels]


_kept_sincos_table = lru_cache(maxsize=32)(sincos_table)
