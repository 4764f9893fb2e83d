"""When factors are generated: once per forward for all layers as one batch, and not again while nothing changed.

A forward pass of the wrapped model opens a *scope*: all factors are generated at its start and every adapted layer
takes its own. Outside a scope:

- without gradients, factors are kept and reused after a comparison of everything they depend on by value;
- with gradients, a layer called by itself generates its own;
- while the backward pass recomputes a checkpointed region, a layer takes what the scope gave it (non-reentrant
  checkpointing, which compares the saved tensors), or generates its own (reentrant, which builds a new graph).
"""

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from gift.tuner.generator import Factors
from gift.tuner.layer import GiftLinear
from gift.tuner.processes import (
    is_distributed,
    refuse_gradients_kept_apart,
    refuse_reentrant,
    refuse_unread_generators,
    sharded_parameters,
)
from gift.tuner.products import LayerFactors, sum_of_residuals
from gift.tuner.targets import Target
from gift.tuner.weights import join_parts, probe_weight


@dataclass
class _Scope:
    """The layers adapted in one forward pass, the factors made for them, and whether gradients flow through them.

    `called` has the layers called so far, and whether any of its calls was with gradients.
    """

    layers: list[str]
    factors: dict[str, LayerFactors]
    has_graph: bool
    called: dict[str, bool]


@dataclass
class _Kept:
    """Factors of one layer with what they were made from: its adapters and a probe of its frozen weight."""

    factors: LayerFactors
    adapters: tuple[tuple[str, float | int], ...]
    probe: Tensor | None  # None for a sharded weight


@dataclass
class FactorSource:
    """Where the adapted layers of one model get the factors of their residuals from.

    A plain object, not a module: the layers can hold it without registering the generators a second time.

    Attributes:
        generators: Adapter -> group of targets -> `WeightGenerator`, as nested module dicts.
        layers: The adapted layers by name.
        groups: Adapter -> group -> the targets that its generator serves.
        torchao_config: What transformers quantised the model with through torchao, or None.
        model: The wrapped model, whose own wrappers are looked at where several processes work together.
    """

    generators: nn.ModuleDict
    layers: dict[str, GiftLinear] = field(default_factory=dict)
    groups: dict[str, dict[str, list[Target]]] = field(default_factory=dict)
    torchao_config: Any = None
    model: nn.Module | None = None

    def __post_init__(self) -> None:
        """Start with nothing generated."""
        self._forget()
        # Layers known to be called by the wrapped model, with and without gradients, training and evaluating: torch's
        # own Transformer layers read weights directly in one of these modes.
        self._checked: dict[tuple[bool, bool], set[str]] = {}

    def _forget(self) -> None:
        self._token = next(_tokens)
        _sources[self._token] = self
        self._sharded: dict[nn.Module, Any] = {}  # FSDP2's records of weights
        self._scopes: dict[int, _Scope] = {}  # by thread: another thread may run without gradients meanwhile
        self._from_scope: dict[str, LayerFactors] = {}  # of the last scope, for recomputation
        self._called: set[str] = set()  # layers called outside of scopes since the last one closed
        self._reentrant: set[str] = set()  # layers called without gradients inside a scope with gradients
        self._recomputed = False  # whether any of them was called again in a backward pass
        self._kept: dict[str, _Kept] = {}
        self._kept_parameters: list[Tensor] = []
        self._pinned: dict[int, set[str]] = {}  # by thread: layers whose factors were compared since they were pinned

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without what belongs to a forward pass."""
        lasting = ("generators", "layers", "groups", "torchao_config", "model", "_checked")
        return {name: self.__dict__[name] for name in lasting}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore with nothing generated."""
        self.__dict__.update(state)
        self._forget()

    def sharded_parameter(self, layer: GiftLinear) -> Any:
        """Return FSDP2's record of the layer's weight, or None."""
        return self._sharded.get(layer.base_layer)

    def look_at_wrappers(self, has_graph: bool) -> None:
        """Note which weights FSDP2 shards; raise RuntimeError if the generators' gradients would be kept apart."""
        if self.model is not None:
            refuse_unread_generators(self.generators)
            self._sharded = sharded_parameters(self.model)
            if has_graph:
                refuse_gradients_kept_apart(self.model, self.generators)

    def drop(self) -> None:
        """Forget every kept factor; the next forward generates anew."""
        self._kept.clear()
        self._kept_parameters.clear()

    def move_generators(self, adapter: str, device: torch.device) -> None:
        """Bring the generators of an adapter to a device."""
        if adapter in self.generators:
            self.generators[adapter].to(device)

    # ---- generating ----------------------------------------------------------------------------------------------

    def generate_targets(self, adapter: str, targets: Sequence[Target]) -> Iterator[tuple[str, list[Target], Factors]]:
        """Yield, for each generator of the adapter that serves some of `targets`: its group, those targets, factors."""
        wanted = set(targets)
        for group, members in self.groups[adapter].items():
            served = [target for target in members if target in wanted]
            if not served:
                continue
            generator = self.generators[adapter][group]  # type: ignore[index]
            device = generator.recover.device.type
            weights = [self.layers[target.layer].frozen_weight(target.part) for target in served]
            with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
                factors = generator(weights)
            yield group, served, factors

    def generate(self, layers: Sequence[GiftLinear], adapters: Sequence[str] | None = None) -> dict[str, LayerFactors]:
        """Return the factors of every layer's residual by name, each generator called once for all of them.

        Args:
            layers: The layers.
            adapters: Adapters to sum; by default those in effect in each layer.
        """
        chosen = {layer.gift_name: list(adapters or layer.adapters_in_effect) for layer in layers}
        pieces: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in chosen}
        for adapter in dict.fromkeys(adapter for names in chosen.values() for adapter in names):
            targets = [
                Target(layer.gift_name, part)
                for layer in layers
                if adapter in chosen[layer.gift_name]
                for part in layer.gift_parts.get(adapter, ())
            ]
            for _, served, factors in self.generate_targets(adapter, targets):
                for name, left in _left_by_layer(served, factors).items():
                    scaling = self.layers[name].gift_scaling[adapter]
                    pieces[name].append((left if scaling == 1 else left * scaling, factors.right))
        return {name: sum_of_residuals(of_layer) for name, of_layer in pieces.items()}

    def _generate_or_reuse(self, layers: Sequence[GiftLinear]) -> dict[str, LayerFactors]:
        if torch.compiler.is_compiling() or self._need_graph(layers):
            return self.generate(layers)
        return self._reuse(layers)

    def _need_graph(self, layers: Sequence[GiftLinear]) -> bool:
        """Return whether gradients are to flow into a generator."""
        adapters = {adapter for layer in layers for adapter in layer.adapters_in_effect}
        return torch.is_grad_enabled() and any(
            parameter.requires_grad for adapter in adapters for parameter in self.generators[adapter].parameters()
        )

    # ---- reusing without gradients -------------------------------------------------------------------------------

    def _reuse(self, layers: Sequence[GiftLinear]) -> dict[str, LayerFactors]:
        """Return kept factors where nothing they depend on changed, and generate and keep the others."""
        trusted = self._pinned.get(_thread(), set())
        if not trusted and not self._same_parameters():
            self._kept.clear()
            self._kept_parameters = self._copy_parameters()
        names = [layer.gift_name for layer in layers]
        kept = {name: self._kept.get(name) for name in names}
        stale = [layer for layer in layers if not _is_valid(kept[layer.gift_name], layer, layer.gift_name in trusted)]
        with torch.inference_mode(False), torch.no_grad():  # what is kept may meet gradients of the input later
            for name, factors in self.generate(stale).items() if stale else ():
                layer = self.layers[name]
                probe = probe_weight(layer.frozen_weight())
                factors.reusable = probe is not None  # of a sharded weight no process is to form W + dW
                kept[name] = self._kept[name] = _Kept(factors, _adapters_of(layer), probe)
        trusted.update(names)
        return {name: of_layer.factors for name, of_layer in kept.items() if of_layer is not None}

    def _same_parameters(self) -> bool:
        """Compare the generators' parameters by value: writes through `.data` leave no other trace."""
        current = list(self.generators.parameters())
        if any(isinstance(parameter, DTensor) for parameter in current):
            return False  # no process knows what changed in the others
        return len(current) == len(self._kept_parameters) and all(
            new.dtype == old.dtype and new.device == old.device and torch.equal(new, old)
            for new, old in zip(current, self._kept_parameters, strict=True)
        )

    def _copy_parameters(self) -> list[Tensor]:
        parameters = list(self.generators.parameters())
        is_sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
        return [] if is_sharded else [parameter.detach().clone() for parameter in parameters]

    @contextmanager
    def pin(self) -> Iterator[None]:
        """Compare what kept factors depend on once, at the first forward inside, e.g. for all steps of `generate`."""
        thread, outer = _thread(), self._pinned.get(_thread())
        self._pinned[thread] = set()
        try:
            yield
        finally:
            self._scopes.pop(thread, None)  # torch calls no forward hook after a keyboard interrupt
            self._pinned.pop(thread)
            if outer is not None:
                self._pinned[thread] = outer

    # ---- the scope of one forward pass ---------------------------------------------------------------------------

    def open_scope(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the wrapped model: generate the factors of all layers with an adapter in effect."""
        layers = [layer for layer in self.layers.values() if layer.adapters_in_effect]
        if not layers:
            return
        has_graph = self._need_graph(layers)
        if is_distributed():
            _look_at_wrappers(self._token, has_graph)
        factors = self._generate_or_reuse([layer for layer in layers if not layer.acts_on_input])
        self._scopes[_thread()] = _Scope([layer.gift_name for layer in layers], factors, has_graph, {})
        if has_graph:
            self._reentrant.clear()
        if has_graph and self._kept and not torch.compiler.is_compiling():
            self._kept.clear()  # training goes on: free W + dW

    def close_scope(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the wrapped model, also after an exception (then `output` is None).

        Raises:
            RuntimeError: If the first forward pass in this mode did not call an adapted layer.
        """
        scope = self._scopes.pop(_thread(), None)
        if scope is None or torch.compiler.is_compiling():
            return
        if scope.has_graph:
            self._from_scope = {name: factors.detached() for name, factors in scope.factors.items()}
            self._expect_recomputation(output)
        if output is not None:
            called = self._called | scope.called.keys()
            self._called.clear()
            self._check_called(module, set(scope.layers), called)

    def _check_called(self, model: nn.Module, names: set[str], called: set[str]) -> None:
        checked = self._checked.setdefault((model.training, torch.is_grad_enabled()), set())
        if names <= checked or _has_compiled_parts(model):
            return
        uncalled = sorted(names - checked - called)
        if uncalled:
            raise RuntimeError(
                f"The forward pass did not call these adapted layers: {', '.join(uncalled[:8])}"
                f"{', ...' if len(uncalled) > 8 else ''}. An adapter there does nothing; the model reads their weights "
                "directly or skips them. Leave them out with exclude_modules or choose other target_modules."
            )
        checked.update(names)

    def _expect_recomputation(self, output: Any) -> None:
        """Let the backward pass of `output` raise if it ends without calling any checkpointed layer again."""
        self._recomputed, started = False, []

        def check_at_the_end(_: Tensor) -> None:
            if not started:
                started.append(True)
                torch.autograd.Variable._execution_engine.queue_callback(self._check_recomputed)

        for tensor in tree_leaves(output) if self._reentrant else ():
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(check_at_the_end)

    def _check_recomputed(self) -> None:
        if not self._recomputed:
            raise RuntimeError(
                "Reentrant checkpointing passed no gradients to the adapted layers, since no input of the checkpointed "
                "blocks needs gradients. Use non-reentrant checkpointing (gradient_checkpointing_kwargs="
                "{'use_reentrant': False}), or call model.enable_input_require_grads() first. Layers that "
                "are called under torch.no_grad alone get none either: leave such layers out with exclude_modules."
            )

    def factors(self, layer: GiftLinear) -> LayerFactors:
        """Return the factors for one call of `layer`: of the open scope, kept ones, or made for this call."""
        name, scope = layer.gift_name, self._scopes.get(_thread())
        if torch.compiler.is_compiling():
            return self.generate([layer])[name] if scope is None else scope.factors[name]
        recomputing = is_recomputing()
        if scope is not None and name in scope.factors:
            self._note_call(name, scope)
            return scope.factors[name]
        self._recomputed = self._recomputed or recomputing
        if recomputing and name in self._from_scope and name not in self._reentrant:
            return self._from_scope[name].refusing_gradients()
        if not recomputing:
            self._called.add(name)
            if torch.is_grad_enabled():
                self._from_scope.pop(name, None)  # this call, not the last scope's, is what could be recomputed
        return self._generate_or_reuse([layer])[name]

    def _note_call(self, name: str, scope: _Scope) -> None:
        scope.called[name] = torch.is_grad_enabled() or scope.called.get(name, False)
        if scope.has_graph and scope.called[name]:
            self._reentrant.discard(name)  # called without gradients on purpose, as by a model that teaches itself
        elif scope.has_graph:
            refuse_reentrant()
            self._reentrant.add(name)

    def input_residual(self, layer: GiftLinear, x: Tensor) -> Tensor:
        """Return what to add to the input of a layer: x psi^T phi^T, summed over the adapters in effect."""
        scope = self._scopes.get(_thread())
        if not torch.compiler.is_compiling():
            self._recomputed = self._recomputed or is_recomputing()
            if scope is not None:
                self._note_call(layer.gift_name, scope)
        residual = torch.zeros_like(x)
        for adapter in layer.adapters_in_effect:
            generator: Any = self._generator_of(adapter, layer)
            psi, phi = (matrix.to(x) for matrix in (generator.recover, generator.reduce.weight))
            residual = residual + layer.gift_scaling[adapter] * (x @ psi.T @ phi)
        return residual

    def _generator_of(self, adapter: str, layer: GiftLinear) -> nn.Module:
        groups = self.groups[adapter].items()
        group = next(group for group, targets in groups if any(target.layer == layer.gift_name for target in targets))
        return self.generators[adapter][group]  # type: ignore[index]


@torch.compiler.assume_constant_result
def _look_at_wrappers(token: int, has_graph: bool) -> bool:
    """Look at the wrappers of one model; in compilation this runs once, with real objects, hence the token."""
    _sources[token].look_at_wrappers(has_graph)
    return True


_tokens = itertools.count()
_sources: "WeakValueDictionary[int, FactorSource]" = WeakValueDictionary()


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def is_recomputing() -> bool:
    """Return whether a backward pass goes on: a layer that runs in one does so for gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


def _has_compiled_parts(model: nn.Module) -> bool:
    """Return whether parts of the model were compiled by themselves, in which calls leave no trace."""
    return any(
        isinstance(module, torch._dynamo.OptimizedModule)
        or module._compiled_call_impl is not None
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )


def _left_by_layer(targets: list[Target], factors: Factors) -> dict[str, Tensor]:
    by_layer: dict[str, dict[str | None, Tensor]] = {}
    for target, left in zip(targets, factors.left, strict=True):
        by_layer.setdefault(target.layer, {})[target.part] = left
    return {name: parts[None] if None in parts else join_parts(parts) for name, parts in by_layer.items()}


def _is_valid(kept: _Kept | None, layer: GiftLinear, trusted: bool) -> bool:
    """Return whether kept factors still fit the layer; `trusted` ones are not compared with the frozen weight."""
    if kept is None or kept.adapters != _adapters_of(layer):
        return False
    if trusted:
        return True
    probe = probe_weight(layer.frozen_weight())
    if probe is None or kept.probe is None:
        return False  # no process knows what changed in the others
    same_place = (probe.dtype, probe.device) == (kept.probe.dtype, kept.probe.device)
    return same_place and torch.equal(probe, kept.probe)


def _adapters_of(layer: GiftLinear) -> tuple[tuple[str, float | int], ...]:
    return tuple((adapter, layer.gift_scaling[adapter]) for adapter in layer.adapters_in_effect)
