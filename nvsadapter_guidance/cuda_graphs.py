"""CUDA graphs of functions of tensors: a call costs one launch instead of a thousand.

A graph replays fixed work on fixed addresses. Inputs are therefore copied into buffers of the graph, and results are
copied out of it; weights are read where they lay at capture, and a graph whose weights have moved is thrown away.
"""

import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

_VALUES = methodcaller("values")
LIMIT = 8
"""Graphs kept by one cache; the least recently used one goes first."""
WARM_UPS = 2
"""Runs on a side stream before capture, in which libraries choose and load their kernels."""

SWITCHES = ("processor", "s1", "s2", "b1", "b2")
"""Attributes of diffusers' modules that change what they compute: attention processors, and FreeU of its blocks."""

Modules = tuple[nn.Module, ...]
TensorFunction = Callable[[Mapping[str, Tensor]], Tensor]


def graphs_possible(modules: Modules, device: torch.device) -> bool:
    """Whether calls on ``modules`` can be captured: they lie on a GPU and no hook moves their weights around."""
    if device.type != "cuda" or torch.is_autocast_enabled(device.type) or torch.cuda.is_current_stream_capturing():
        return False
    return not is_offloaded(modules)


def is_offloaded(modules: Iterable[nn.Module]) -> bool:
    """Whether accelerate moves the weights to and fro."""
    return any(hasattr(module, "_hf_hook") for module in modules)


def has_adapters(modules: Iterable[nn.Module]) -> bool:
    """Whether peft has added layers (LoRA), whose scales are plain numbers that a graph would go on using."""
    return any(hasattr(module, "adapter_layer_names") for module in modules)


@contextmanager
def convolution_search(wanted: bool) -> Iterator[None]:
    """Let cuDNN time its algorithms for every new shape, unless deterministic ones are asked for.

    It keeps what the first call of a shape has chosen, timed or guessed. The switch is the process's: it is as before
    when the last of the threads that want a search has left.
    """
    if not wanted or torch.are_deterministic_algorithms_enabled():
        yield
        return
    _SEARCH.enter()
    try:
        yield
    finally:
        _SEARCH.leave()


class _SearchSwitch:
    """``torch.backends.cudnn.benchmark`` while any thread is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._usual = False

    def enter(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._usual = torch.backends.cudnn.benchmark
                torch.backends.cudnn.benchmark = True
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                torch.backends.cudnn.benchmark = self._usual


_SEARCH = _SearchSwitch()


@functools.cache
def side_stream(device: int) -> torch.cuda.Stream:
    """The one stream beside the usual one: libraries keep a workspace for every stream they have seen, for good."""
    return torch.cuda.Stream(device)


def capture(function: Callable[[], Any], pool: Any, warm_ups: int = WARM_UPS) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Run ``function`` a few times on a side stream, then capture it; the graph and what the function returned."""
    stream, side = torch.cuda.current_stream(), side_stream(torch.cuda.current_device())
    side.wait_stream(stream)
    with torch.cuda.stream(side):
        for _ in range(warm_ups):
            function()
    stream.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads may go on using the device.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = function()
    finally:
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own stream current
    return graph, result


class Beside:
    """Results of a function that runs on a stream of its own while a graph is captured, so that replays overlap it.

    Outside of a capture it has run when this is made: there, memory would change hands between streams.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self._side: torch.cuda.Stream | None = None
        if not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
            self._result = function()
            return
        self._side = side_stream(torch.cuda.current_device())
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            self._result = function()

    def __call__(self) -> Any:
        """Return the result; what is launched from now on comes after it."""
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)
            self._side = None
        return self._result


class WeightsAt:
    """What modules consist of, and where their weights lie; asked at every call, so it compares few long lists."""

    def __init__(self, modules: Modules) -> None:
        self.modules = modules
        parts = [part for module in modules for part in module.modules()]
        self._attributes = [part.__dict__ for part in parts]
        self._switched = [part.__dict__ for part in parts if "processor" in part.__dict__ or "resnets" in part._modules]
        self._children = [part._modules for part in parts]
        self._tensors = [tensors for part in parts for tensors in (part._parameters, part._buffers)]
        self.state = self._state()

    def unchanged(self, modules: Modules) -> bool:
        """Whether these are the same modules, of the same parts, with their weights at the same places."""
        same = len(modules) == len(self.modules) and all(a is b for a, b in zip(modules, self.modules, strict=True))
        return same and self.state == self._state()

    def _state(self) -> list[Any]:
        return [
            *chain.from_iterable(map(_VALUES, self._children)),
            *[
                None if tensor is None else tensor.data_ptr()
                for tensor in chain.from_iterable(map(_VALUES, self._tensors))
            ],
            *[attributes["training"] for attributes in self._attributes],
            *[attributes.get(name) for attributes in self._switched for name in SWITCHES],
        ]


class GraphedCall:
    """One captured function with its buffers; inputs of other shapes need another one."""

    def __init__(
        self,
        function: TensorFunction,
        inputs: Mapping[str, Tensor],
        modules: Modules,
        pool: Any,
        done: torch.cuda.Event,
    ) -> None:
        self.weights = WeightsAt(modules)
        self.buffers = {name: torch.empty_like(value).copy_(value) for name, value in inputs.items()}
        self._sources: dict[str, tuple[Tensor, int]] = {}
        self._done = done
        self.graph, self.output = capture(lambda: function(self.buffers), pool)

    def replay(self, varying: Mapping[str, Tensor], constant: Mapping[str, Tensor]) -> Tensor:
        """The function of these inputs; constants are copied where they are other tensors, or changed, since last."""
        stream = torch.cuda.current_stream()
        stream.wait_event(self._done)
        for name, value in varying.items():
            self.buffers[name].copy_(value, non_blocking=True)
        for name, value in constant.items():
            version = -1 if value.is_inference() else value._version
            known = self._sources.get(name)
            if known is None or known[0] is not value or known[1] != version or version < 0:
                self.buffers[name].copy_(value, non_blocking=True)
                self._sources[name] = value, version
        self.graph.replay()
        result = self.output.clone()
        self._done.record(stream)
        return result


class GraphCache:
    """Graphs of the calls on a model, by the shapes of their inputs.

    The first call of a shape runs as it is, the second one is captured, so that a shape that is used once costs
    nothing. Where capture fails, the reason is logged once and calls run as they are from then on.
    """

    def __init__(self, enabled: bool = False, search: bool = False) -> None:
        self.enabled = enabled
        self.search = search
        """Whether calls are worth the time of a `convolution_search`."""
        self._calls: OrderedDict[Any, GraphedCall] = OrderedDict()
        self._seen: set[Any] = set()
        self._pool: Any = None
        self._done: torch.cuda.Event | None = None
        """End of the last replay: graphs share memory, so those of other streams wait for it."""
        self._failed = False
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "GraphCache":
        return GraphCache(self.enabled, self.search)

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphCache, (self.enabled, self.search)

    def __len__(self) -> int:
        return len(self._calls)

    def switch(self, enabled: bool) -> None:
        """Let graphs be made from now on, or give the memory of all there are back and make none."""
        with self._lock:
            self.enabled = enabled
            if not enabled:
                self.clear()

    def clear(self) -> None:
        """Give the memory of all graphs back."""
        self._calls.clear()
        self._seen.clear()
        self._pool = None

    def __call__(
        self,
        key: Any,
        function: TensorFunction,
        varying: Mapping[str, Tensor],
        constant: Mapping[str, Tensor],
        modules: Modules,
    ) -> Tensor:
        """``function({**varying, **constant})`` without gradients.

        Args:
            key: stands for everything that the function depends on besides its inputs and the weights.
            varying: other values at every call.
            constant: the same tensors from call to call; they are looked at, and copied when they are others.
            modules: whose weights the function uses.
        """
        inputs = {**varying, **constant}
        device = next(iter(inputs.values())).device
        with torch.no_grad():
            if not self.enabled or self._failed or not graphs_possible(modules, device):
                return function(inputs)
            # Buffers made in inference mode could not be written outside of it.
            with (
                self._lock,
                torch.inference_mode(False),
                torch.no_grad(),
                torch.cuda.device(device),
                convolution_search(self.search),
            ):
                call = self._find((key, _shapes(inputs.items())), function, inputs, modules)
                return function(inputs) if call is None else call.replay(varying, constant)

    def _find(
        self, key: Any, function: TensorFunction, inputs: Mapping[str, Tensor], modules: Modules
    ) -> GraphedCall | None:
        if key in self._calls and not self._calls[key].weights.unchanged(modules):
            self.clear()
        if key not in self._seen:
            self._seen.add(key)
            return None
        if key not in self._calls:
            if any(is_offloaded(module.modules()) or has_adapters(module.modules()) for module in modules):
                return None
            try:
                self._pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
                self._done = self._done or torch.cuda.Event()
                self._calls[key] = GraphedCall(function, inputs, modules, self._pool, self._done)
            except RuntimeError as error:
                self._failed = True
                self.clear()
                log.warning("CUDA graphs are off, calls run as they are: %s", str(error).splitlines()[0])
                return None
            if len(self._calls) > LIMIT:
                self._calls.popitem(last=False)
        self._calls.move_to_end(key)
        return self._calls[key]


def _shapes(inputs: Iterable[tuple[str, Tensor]]) -> tuple[Any, ...]:
    return tuple((name, value.shape, value.dtype, value.device) for name, value in inputs)
