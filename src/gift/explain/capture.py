"""Watch the layers of a model, and leave it as it was."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from gift.tuner.layer import GiftLinear


@contextmanager
def watched(layers: Mapping[str, nn.Module], watch: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `watch` with the name and the output of every layer whenever it runs."""

    def watcher(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        return lambda module, args, output: watch(name, output.detach())

    hooks = [layer.register_forward_hook(watcher(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation, and each of its modules back into the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    if any(modes.values()):  # else what an adapter keeps from one forward to the next would be dropped in vain
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def before_adaptation(layers: Iterable[GiftLinear]) -> Iterator[None]:
    """Let layers put out what they did before adaptation; heads and the choice of adapters stay."""
    before = {layer: layer._disable_adapters for layer in layers}
    try:
        for layer in before:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in before.items():
            layer._disable_adapters = disabled
