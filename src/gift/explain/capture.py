"""Record what adapted layers put out, and leave the model as it was."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def recorded_outputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that holds, after each forward pass, the output of every layer by its name."""
    outputs: dict[str, Tensor] = {}

    def recorder(name: str):  # noqa: ANN202 - a hook, whose type PyTorch spells out
        def record(module: nn.Module, args: tuple, output: Tensor) -> None:
            outputs[name] = output.detach()

        return record

    hooks = [layer.register_forward_hook(recorder(name)) for name, layer in layers.items()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation, and each of its modules back into the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
