"""Attention to clusters and plain attention, against formulas written out here in float64."""

import math

import pytest
import torch
from torch import nn

from gift.tuner.attention import ClusterAttention, SelfAttention


def random_tokens(batch=2, tokens=7, channels=6):
    return torch.randn(batch, tokens, channels, dtype=torch.float64)


def randomise(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.double()


def attend(query, key, value, heads):
    """Softmax attention per head, one head after the other, with explicit sums of products."""
    width = query.shape[-1] // heads
    outputs = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        logits = torch.einsum("bnd,bmd->bnm", query[..., part], key[..., part]) / math.sqrt(width)
        weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
        outputs.append(torch.einsum("bnm,bmd->bnd", weights, value[..., part]))
    return torch.cat(outputs, dim=-1)


def linear(values, layer):
    return torch.einsum("...i,oi->...o", values, layer.weight) + layer.bias


@pytest.mark.parametrize("heads", [1, 3])
def test_parameter_to_cluster_attention_is_the_formula_of_the_paper(heads):
    attention = randomise(ClusterAttention(6, 5, heads=heads, gain=1.7))
    tokens = random_tokens()
    output, assignment = attention(tokens)

    expected_assignment = 1 / (1 + torch.exp(-1.7 * linear(tokens, attention.cluster)))
    clusters = torch.einsum("bnm,bnd->bmd", expected_assignment, tokens) / 7
    clusters = clusters / clusters.square().sum(-1, keepdim=True).sqrt()
    query, key = linear(tokens, attention.query), linear(clusters, attention.key)
    attended = attend(query, key, linear(clusters, attention.value), heads)

    assert (assignment - expected_assignment).abs().max() < 1e-10
    assert (output - linear(attended, attention.project)).abs().max() < 1e-10


def test_patch_to_cluster_attention_sums_to_one_over_the_tokens_and_uses_layer_norm():
    attention = randomise(ClusterAttention(6, 5, assignment="softmax", norm="layer"))
    tokens = random_tokens()
    output, assignment = attention(tokens)

    logits = linear(tokens, attention.cluster)
    expected_assignment = logits.exp() / logits.exp().sum(1, keepdim=True)
    clusters = torch.einsum("bnm,bnd->bmd", expected_assignment, tokens)
    centred = clusters - clusters.mean(-1, keepdim=True)
    clusters = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    clusters = clusters * attention.norm.weight + attention.norm.bias
    attended = attend(
        linear(tokens, attention.query), linear(clusters, attention.key), linear(clusters, attention.value), 1
    )

    assert torch.allclose(assignment.sum(1), torch.ones(2, 5, dtype=torch.float64))
    assert (assignment - expected_assignment).abs().max() < 1e-10
    assert (output - linear(attended, attention.project)).abs().max() < 1e-10


def test_self_attention_is_softmax_attention_over_the_tokens():
    attention = randomise(SelfAttention(6, heads=2))
    tokens = random_tokens()
    output, assignment = attention(tokens)
    attended = attend(*(linear(tokens, layer) for layer in (attention.query, attention.key, attention.value)), 2)
    assert assignment is None
    assert (output - linear(attended, attention.project)).abs().max() < 1e-10


@pytest.mark.parametrize("channels", [4, 16, 96])
def test_with_gain_one_every_assignment_of_unit_tokens_starts_within_three_hundredths_of_a_half(channels):
    attention = ClusterAttention(channels, 96)
    tokens = nn.functional.normalize(torch.randn(1, 500, channels), dim=-1)
    aligned = nn.functional.normalize(attention.cluster.weight.detach(), dim=-1)[None]  # the worst tokens there are
    for extreme in (tokens, aligned, -aligned):
        assert (attention.assign(extreme) - 0.5).abs().max() < 0.03


def test_a_learned_gain_starts_at_its_value_and_is_trained():
    attention = ClusterAttention(6, 5, gain=8.0, learn_gain=True)
    fixed = ClusterAttention(6, 5, gain=8.0)
    fixed.cluster = attention.cluster
    tokens = random_tokens().float()
    assert torch.equal(attention.assign(tokens), fixed.assign(tokens))
    attention(tokens)[0].sum().backward()
    assert attention.gain.grad is not None
    assert attention.gain.grad.abs() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 4}, "4 heads for 6 channels"),
        ({"assignment": "tanh"}, "Unknown assignment 'tanh'"),
        ({"norm": "batch"}, "Unknown norm 'batch'"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        ClusterAttention(6, 5, **options)
