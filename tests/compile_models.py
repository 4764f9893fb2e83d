"""Compile an adapted model, or only its blocks in three ways, and compare all gradients with those of plain eager.

Run by tests/tuner/test_scope.py in a process of its own, without the test suite's shape checks.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.models import make_adapted_vit, make_images


def compile_forward(block):
    block.forward = torch.compile(block.forward, backend="eager")
    return block


def compile_in_place(block):
    block.compile(backend="eager")
    return block


WAYS = {
    "blocks as modules": lambda block: torch.compile(block, backend="eager"),
    "blocks in place": compile_in_place,
    "forward of blocks": compile_forward,
}


def gradients(model, images, parameters):
    return torch.autograd.grad(model(images).square().sum(), parameters)


def main():
    torch.set_num_threads(1)
    images = make_images().double()
    for way in ("whole model", *WAYS):
        model = make_adapted_vit().double()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        expected = gradients(model, images, parameters)
        blocks = model.base_model.model.blocks
        if way == "whole model":
            model = torch.compile(model, backend="aot_eager", fullgraph=True)
        else:
            for index, block in enumerate(blocks):
                blocks[index] = WAYS[way](block)
        got = gradients(model, images, parameters)
        difference = max((one - other).abs().max().item() for one, other in zip(got, expected, strict=True))
        print(f"{way}: largest difference {difference:.1e}")
        assert difference < 1e-10


if __name__ == "__main__":
    main()
