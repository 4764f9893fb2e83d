"""Every generator against its formula, written out here in float64: residual, assignments and all gradients."""

import math

import pytest
import torch
from torch import nn

from gift.tuner.generator import WeightGenerator, sincos_table
from gift.tuner.options import GENERATORS, GeneratorOptions

LAYERS, ROWS, COLUMNS, RANK = 3, 10, 14, 6

CASES = {
    "paca": {},
    "paca with everything": {
        "num_blocks": 2,
        "num_heads": 3,
        "assignment_gain": 2.5,
        "learn_assignment_gain": True,
        "reduce_bias": True,
        "recover_bias": True,
        "position": "learned",
    },
    "paca, layer norm, softmax": {"norm": "layer", "assignment": "softmax"},
    "paca without norm": {"norm": "none", "position": "none"},
    "paca without feed-forward": {"mlp_ratio": 0},
    "transformer": {"generator": "transformer", "num_heads": 2, "num_blocks": 2},
    "mlp": {"generator": "mlp", "mlp_ratio": 1.5},
    "mixer": {"generator": "mixer", "num_mixed_tokens": 5},
    "mlp with another activation": {"generator": "mlp", "activation": "silu"},
    "linear": {"generator": "linear"},
    "linear with an activation": {"generator": "linear", "activation": "tanh"},
    "linear with biases": {"generator": "linear", "reduce_bias": True, "recover_bias": True},
}


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_generator(**options):
    options = GeneratorOptions(**({"r": RANK, "num_clusters": 5} | options))
    generator = WeightGenerator(COLUMNS, ROWS, options)
    for parameter in generator.parameters():
        nn.init.normal_(parameter, std=0.5)
    return generator


def make_weights(layers=LAYERS):
    return [torch.randn(ROWS, COLUMNS) for _ in range(layers)]


# ---- the formulas, one weight at a time, from the parameters by name ----------------------------------------------


def linear(values, parameters, name):
    return values @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"]


ACTIVATIONS = {
    "identity": lambda values: values,
    "gelu": lambda values: 0.5 * values * (1 + torch.erf(values / math.sqrt(2))),
    "silu": lambda values: values / (1 + torch.exp(-values)),
    "tanh": lambda values: (torch.exp(2 * values) - 1) / (torch.exp(2 * values) + 1),
}


def feed_forward(values, parameters, name, activation):
    hidden = ACTIVATIONS[activation](linear(values, parameters, f"{name}.expand"))
    return linear(hidden, parameters, f"{name}.contract")


def unit(values):
    return values / values.square().sum(-1, keepdim=True).sqrt()


def norm(values, parameters, name, kind):
    if kind == "l2":
        return unit(values)
    if kind == "none":
        return values
    centred = values - values.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * parameters[f"{name}.weight"] + parameters[f"{name}.bias"]


def attend(query, key, value, heads):
    width, outputs = RANK // heads, []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        weights = torch.exp(query[:, part] @ key[:, part].T / math.sqrt(width))
        outputs.append(weights / weights.sum(1, keepdim=True) @ value[:, part])
    return torch.cat(outputs, dim=1)


def mix(tokens, parameters, name, options, gain):
    """Return what the first part of a block adds, and its assignment."""
    if options.generator == "mixer":
        return feed_forward(tokens.T, parameters, f"{name}.feed_forward", options.activation).T, None
    source, assignment = tokens, None
    if options.generator == "paca":
        logits = gain * linear(tokens, parameters, f"{name}.cluster")
        if options.assignment == "sigmoid":
            assignment = 1 / (1 + torch.exp(-logits))
            source = assignment.T @ tokens / ROWS
        else:
            assignment = logits.exp() / logits.exp().sum(0)
            source = assignment.T @ tokens
        source = unit(source)
    query = linear(tokens, parameters, f"{name}.query")
    key, value = linear(source, parameters, f"{name}.key"), linear(source, parameters, f"{name}.value")
    return linear(attend(query, key, value, options.num_heads), parameters, f"{name}.project"), assignment


def position_of(parameters, options):
    if options.position == "none":
        return 0.0
    if options.position == "learned":
        return parameters["position"]
    table = torch.zeros(ROWS, RANK)
    for index in range(ROWS):
        for channel in range(RANK):
            angle = index / 10000 ** ((channel % (RANK // 2)) / (RANK // 2))
            table[index, channel] = math.sin(angle) if channel < RANK // 2 else math.cos(angle)
    return parameters["position"] * table


def formula(weight, parameters, options):
    """Return the residual of one weight and the assignment of every block."""
    tokens = weight @ parameters["reduce.weight"].T
    if options.reduce_bias:
        tokens = tokens + parameters["reduce.bias"]
    tokens = tokens + position_of(parameters, options)
    if options.generator == "linear":
        tokens = ACTIVATIONS[options.activation](tokens)
    assignments = [tokens] if options.generator == "linear" else []
    for block in range(0 if options.generator == "linear" else options.num_blocks):
        name = f"blocks.{block}"
        if options.generator != "mlp":
            gain = parameters.get(f"{name}.mixing.gain", options.assignment_gain)
            normed = norm(tokens, parameters, f"{name}.mixing_norm", options.norm)
            mixed, assignment = mix(normed, parameters, f"{name}.mixing", options, gain)
            tokens = tokens + mixed
            assignments += [] if assignment is None else [assignment]
        if options.mlp_ratio:
            normed = norm(tokens, parameters, f"{name}.feed_forward_norm", options.norm)
            tokens = tokens + feed_forward(normed, parameters, f"{name}.feed_forward", options.activation)
    residual = tokens @ parameters["recover"]
    if options.recover_bias:
        residual = residual + torch.ones(ROWS, 1) * parameters["recover_bias"]
    return residual, assignments


# ---- the tests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_residual_assignments_and_all_gradients_are_those_of_the_formula(case):
    generator, weights = make_generator(**CASES[case]), make_weights()
    parameters = {name: p.detach().clone().requires_grad_() for name, p in generator.named_parameters()}
    directions = [torch.randn(ROWS, COLUMNS) for _ in weights]

    factors = generator(weights)
    expected = [formula(weight, parameters, generator.options) for weight in weights]
    sum((left @ factors.right * d).sum() for left, d in zip(factors.left, directions, strict=True)).backward()
    sum((residual * d).sum() for (residual, _), d in zip(expected, directions, strict=True)).backward()

    for layer, (residual, assignments) in enumerate(expected):
        assert (factors.left[layer] @ factors.right - residual).abs().max() < 1e-10
        assert len(factors.assignments[layer]) == len(assignments)
        for got, assignment in zip(factors.assignments[layer], assignments, strict=True):
            assert (got - assignment).abs().max() < 1e-10
    for name, parameter in generator.named_parameters():
        assert parameters[name].grad is not None, name
        scale = max(1.0, parameters[name].grad.abs().max().item())
        assert (parameter.grad - parameters[name].grad).abs().max() < 1e-10 * scale, name


def test_the_cases_above_cover_every_generator():
    assert {options.get("generator", "paca") for options in CASES.values()} == set(GENERATORS)


@pytest.mark.parametrize("name", GENERATORS)
def test_the_residual_is_exactly_zero_at_the_start(name):
    generator = WeightGenerator(COLUMNS, ROWS, GeneratorOptions(generator=name, r=RANK, recover_bias=True))
    factors = generator(make_weights())
    for left in factors.left:
        assert torch.equal(left @ factors.right, torch.zeros(ROWS, COLUMNS))


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("scale", [0.02, 1.0])
def test_exchanging_the_weights_of_two_layers_changes_the_left_factors_by_half_their_norm_at_least(name, scale):
    generator = WeightGenerator(192, 192, GeneratorOptions(generator=name))
    first, second = (scale * torch.randn(192, 192) for _ in range(2))
    generator.calibrate([first, second])
    one, other = torch.stack(generator([first, second]).left), torch.stack(generator([second, first]).left)
    assert (one - other).norm() >= 0.5 * one.norm()


def test_sincos_positions_start_at_a_tenth_of_the_tokens_root_mean_square():
    generator, weights = WeightGenerator(192, 64, GeneratorOptions()), [0.03 * torch.randn(64, 192) for _ in range(4)]
    generator.calibrate(weights)
    tokens = torch.stack([weight @ generator.reduce.weight.T for weight in weights])
    assert generator.position.item() == pytest.approx(0.1 * tokens.square().mean().sqrt().item())


def test_learned_positions_start_at_zero():
    generator = WeightGenerator(COLUMNS, ROWS, GeneratorOptions(r=RANK, position="learned"))
    assert torch.equal(generator.position, torch.zeros(ROWS, RANK))


@pytest.mark.parametrize(("tokens", "channels"), [(5, 4), (5, 7), (1, 1)])
def test_the_sincos_table_has_any_size(tokens, channels):
    assert sincos_table(tokens, channels).shape == (tokens, channels)


def test_with_default_options_every_assignment_of_a_layer_starts_within_three_hundredths_of_a_half():
    generator = WeightGenerator(192, 192, GeneratorOptions())
    weights = [0.03 * torch.randn(192, 192) for _ in range(12)]
    generator.calibrate(weights)
    for (assignment,) in generator(weights).assignments:
        assert (assignment - 0.5).abs().max() < 0.03


def test_one_generator_serves_weights_of_different_output_widths():
    generator = make_generator()
    weights = [torch.randn(ROWS, COLUMNS), torch.randn(4, COLUMNS), torch.randn(ROWS, COLUMNS)]
    together = generator(weights)
    for weight, left in zip(weights, together.left, strict=True):
        assert torch.allclose(generator([weight]).left[0], left, atol=1e-12)


@pytest.mark.parametrize("options", [{"generator": "mixer"}, {"position": "learned"}])
def test_a_generator_bound_to_a_number_of_rows_refuses_others(options):
    with pytest.raises(ValueError, match="weights of 10 rows, got 4"):
        make_generator(**options)([torch.randn(4, COLUMNS)])


def test_half_precision_weights_are_kept_for_the_backward_pass_in_their_own_dtype():
    generator = make_generator().float()
    weights = [weight.bfloat16() for weight in make_weights()]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        factors = generator(weights)
    assert not [t for t in kept if t.shape == (ROWS, COLUMNS) and t.dtype == torch.float32]
    sum(left.sum() for left in factors.left).backward()
    copy = make_generator().float()
    copy.load_state_dict(generator.state_dict())
    sum(left.sum() for left in copy([weight.float() for weight in weights]).left).backward()
    assert torch.allclose(generator.reduce.weight.grad, copy.reduce.weight.grad, rtol=1e-5)


def test_the_published_parameter_counts_are_met():
    def count(**options):
        return sum(p.numel() for p in WeightGenerator(768, 768, GeneratorOptions(**options)).parameters())

    assert count(generator="linear") == 24_576
    assert count(position="none") == 28_368
    assert count(r=96, position="none") == 231_168
    assert count() == 28_369  # the gain of the positions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generator": "magic"}, "Unknown generator 'magic': choose one of paca"),
        ({"position": "rotary"}, "Unknown position"),
        ({"norm": "batch"}, "Unknown norm"),
        ({"assignment": "tanh"}, "Unknown assignment"),
        ({"r": 0}, "r must be a whole number of at least 1, got 0"),
        ({"num_clusters": -3}, "num_clusters must be"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio must be a finite number"),
        ({"num_heads": 3}, "3 heads for 16 channels"),
        ({"generator": "linear", "position": "sincos"}, "linear generator has no positions"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        GeneratorOptions(**options)
