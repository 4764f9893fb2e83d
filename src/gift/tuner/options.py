"""What a generator is made of: every option, its default, its check."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

GENERATORS = ("paca", "linear", "transformer", "mlp", "mixer")
POSITIONS = ("sincos", "learned", "none")
NORMS = ("l2", "layer", "none")
ASSIGNMENTS = ("sigmoid", "softmax")
ACTIVATIONS = ("identity", "gelu", "relu", "silu", "tanh", "sigmoid")


@dataclass
class GeneratorOptions:
    """What a generator is made of.

    Args:
        generator: Kind: `paca` (blocks of Parameter-to-Cluster attention), `transformer` (plain self-attention), `mlp`,
            `mixer` (an MLP along the tokens, then one along the channels) or `linear` (no blocks).
        r: Width of a parameter token inside the generator; rank of the residual.
        num_clusters: Number of clusters of `paca`; `linear` always has `r`, the others have none.
        num_blocks: Number of blocks; `linear` has none.
        num_heads: Attention heads of `paca` and `transformer`; must divide `r`.
        mlp_ratio: Hidden width of the feed-forward part as a multiple of `r`; 0 leaves it out.
        num_mixed_tokens: Hidden width of `mixer` along the tokens, absolute.
        position: Encoding of the token index: `sincos` (fixed table times a learned gain), `learned` (a table that
            starts at zero) or `none`. By default `sincos`; `linear` takes `none` only.
        norm: Norm before each part of a block: `l2`, `layer` or `none`. Cluster tokens always have the `l2` norm.
        activation: Activation of the feed-forward parts, by default the exact `gelu`; in `linear`, of the reduced
            weight, by default `identity`. Others: `relu`, `silu`, `tanh`, `sigmoid`.
        assignment: Activation of the assignment of tokens to clusters: `sigmoid`, or `softmax` over the tokens.
        assignment_gain: Factor on the assignment's logits. With `l2` norm and gain 1 every sigmoid entry starts
            within 0.03 of one half.
        learn_assignment_gain: Whether that factor is trained.
        reduce_bias: Whether the map from `in_features` to `r` has a bias.
        recover_bias: Whether the map from `r` back to `in_features` has a bias, zero at the start.
        init_scale: Factor on the initial weights of the first map, hence on the left factor the zero last map meets.

    Raises:
        ValueError: If a name is unknown or a number does not make sense.
    """

    generator: str = "paca"
    r: int = 16
    num_clusters: int = 96
    num_blocks: int = 1
    num_heads: int = 1
    mlp_ratio: float | int = 2.0
    num_mixed_tokens: int = 64
    position: str | None = None
    norm: str = "l2"
    activation: str | None = None
    assignment: str = "sigmoid"
    assignment_gain: float | int = 1.0
    learn_assignment_gain: bool = False
    reduce_bias: bool = False
    recover_bias: bool = False
    init_scale: float | int = 1.0

    def __post_init__(self) -> None:
        """Fill in what depends on the kind of generator, and check every option."""
        if self.activation is None:
            self.activation = "identity" if self.generator == "linear" else "gelu"
        if self.position is None:
            self.position = "none" if self.generator == "linear" else "sincos"
        check_choice("generator", self.generator, GENERATORS)
        check_choice("position", self.position, POSITIONS)
        check_choice("norm", self.norm, NORMS)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("assignment", self.assignment, ASSIGNMENTS)
        for name in ("r", "num_clusters", "num_blocks", "num_heads", "num_mixed_tokens"):
            check_number(name, getattr(self, name), smallest=1, whole=True)
        check_number("mlp_ratio", self.mlp_ratio, smallest=0)
        check_number("assignment_gain", self.assignment_gain)
        check_number("init_scale", self.init_scale)
        for name in ("learn_assignment_gain", "reduce_bias", "recover_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}.")
        if self.generator == "linear" and self.position != "none":
            raise ValueError(f"The linear generator has no positions, got position={self.position!r}: leave it out.")
        if self.generator in ("paca", "transformer"):
            check_heads(self.r, self.num_heads)

    @property
    def binds_tokens(self) -> bool:
        """Whether a generator made so serves one number of parameter tokens only."""
        return self.generator == "mixer" or self.position == "learned"


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless the option called `name` has one of the values it can have."""
    if value not in choices:
        raise ValueError(f"Unknown {name} {value!r}: choose one of {', '.join(choices)}.")


def check_number(name: str, value: object, smallest: int | None = None, whole: bool = False) -> None:
    """Raise ValueError unless the option called `name` is a finite (whole) number of at least `smallest`."""
    kind = "a whole number" if whole else "a finite number"
    fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not fits or not math.isfinite(value) or (smallest is not None and value < smallest):  # type: ignore[arg-type]
        raise ValueError(
            f"{name} must be {kind}{'' if smallest is None else f' of at least {smallest}'}, got {value!r}."
        )


def check_heads(channels: int, heads: int) -> None:
    """Raise ValueError unless `heads` is a positive divisor of `channels`."""
    if heads < 1 or channels % heads:
        raise ValueError(f"Got {heads} heads for {channels} channels: the number of heads must divide the channels.")
