"""CUDA graphs: replayed calls equal plain ones, whatever changes between calls."""

import copy
import gc
import logging
import pickle
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from tiny_nvs import tiny_nvs_model
from torch import Tensor, nn

from nvsadapter_guidance.cuda_graphs import GraphCache, GraphedCall, WeightsAt, convolution_search, has_adapters
from nvsadapter_guidance.diffusers_pipeline import NVSAdapterPipeline
from nvsadapter_guidance.frozen_encoder import FrozenEncoder
from nvsadapter_guidance.guidance import ScoreDistillation
from nvsadapter_guidance.memory import PLANS, MemoryPlan
from nvsadapter_guidance.model import NVSModel
from nvsadapter_guidance.pipeline import Poses
from nvsadapter_guidance.sampling import SamplingOptions, sample_latents

VIEWS = 8
SHARES = (0.1, 0.9)


def linear(inputs: Mapping[str, Tensor]) -> Tensor:
    return inputs["x"] * inputs["scale"]


def test_without_a_gpu_calls_run_as_they_are() -> None:
    cache = GraphCache(enabled=True)
    x, scale = torch.arange(3.0), torch.tensor(2.0)
    for _ in range(3):
        assert torch.equal(cache("key", linear, {"x": x}, {"scale": scale}, (nn.Identity(),)), 2 * x)
    assert len(cache) == 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_of_a_model_have_no_graphs_of_the_first(duplicate: Callable[[GraphCache], GraphCache]) -> None:
    cache = GraphCache(enabled=True, search=True)
    cache._calls["key"] = cast(GraphedCall, threading.Lock())  # can no more be copied than a graph
    twin = duplicate(cache)
    assert (len(cache), len(twin)) == (1, 0) and twin.enabled and twin.search


def changed(module: nn.Module, change: Callable[[], object]) -> bool:
    """Whether a graph of the module is seen to be stale after a change."""
    weights = WeightsAt((module,))
    assert weights.unchanged((module,))
    change()
    return not weights.unchanged((module,))


def test_weights_that_move_or_are_replaced_make_a_graph_stale() -> None:
    layer: Any = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert not changed(layer, lambda: layer[0].weight.data.mul_(2.0)), "a graph reads the new numbers"
    assert changed(layer, lambda: setattr(layer[0].weight, "data", torch.ones(4, 4)))
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    assert changed(layer, lambda: layer.load_state_dict(state, assign=True))
    assert changed(layer, lambda: setattr(layer[1], "running_mean", torch.ones(4)))
    assert changed(layer, lambda: layer.__setitem__(0, copy.deepcopy(layer[0])))
    assert changed(layer, layer.eval)
    assert not WeightsAt((layer,)).unchanged((layer, layer))


def test_networks_that_compute_something_else_make_a_graph_stale() -> None:
    unet: Any = tiny_nvs_model().network.unet
    assert changed(unet, lambda: unet.set_attn_processor(AttnProcessor()))
    assert changed(unet, lambda: unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4))
    assert changed(unet, lambda: unet.enable_freeu(s1=0.8, s2=0.2, b1=1.2, b2=1.4))
    peft = pytest.importorskip("peft")
    assert not has_adapters(unet.modules())
    assert changed(unet, lambda: unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"])))
    assert has_adapters(unet.modules())


@pytest.mark.parametrize("graphs", [True, False])
def test_the_low_memory_plan_makes_no_graphs(graphs: bool) -> None:
    model = tiny_nvs_model()
    ScoreDistillation(model, memory=PLANS["low"], graphs=graphs)
    assert not model.graphs.enabled
    ScoreDistillation(model, memory=PLANS["normal"], graphs=graphs)
    assert model.graphs.enabled == graphs


def test_whoever_wants_no_graphs_gives_the_memory_of_those_there_are_back() -> None:
    def cache_with_a_graph(model: NVSModel) -> GraphCache:
        model.graphs.switch(True)
        model.graphs._calls["key"] = cast(GraphedCall, object())
        return model.graphs

    pipeline = NVSAdapterPipeline.from_model(tiny_nvs_model())
    pipeline.set_progress_bar_config(disable=True)
    cache = cache_with_a_graph(pipeline.model)
    for graph, left in (("auto", 1), ("off", 0)):
        pipeline(torch.zeros(3, 32, 32), [0], [0], num_inference_steps=1, graph=graph)
        assert len(cache) == left and cache.enabled == (graph == "auto")
    model = tiny_nvs_model()
    cache = cache_with_a_graph(model)
    ScoreDistillation(model, graphs=True)
    assert len(cache) == 1
    ScoreDistillation(model, graphs=False)
    assert len(cache) == 0


@pytest.mark.parametrize("usual", [False, True])
def test_the_search_of_several_threads_ends_with_the_last(usual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", usual)
    # A run of an earlier test in this process may have switched them on.
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    first_is_in, second_is_in, first_is_out = threading.Event(), threading.Event(), threading.Event()
    seen = []

    def first() -> None:
        with convolution_search(True):
            first_is_in.set()
            second_is_in.wait(10)
        first_is_out.set()

    thread = threading.Thread(target=first)
    thread.start()
    first_is_in.wait(10)
    with convolution_search(True):
        second_is_in.set()
        first_is_out.wait(10)
        seen.append(torch.backends.cudnn.benchmark)
    thread.join()
    assert seen == [True] and torch.backends.cudnn.benchmark == usual
    with convolution_search(False):
        assert torch.backends.cudnn.benchmark == usual


def test_deterministic_algorithms_are_not_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with convolution_search(True):
        assert not torch.backends.cudnn.benchmark


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative; kernels may sum in another order, in TF32 or half precision, while a stale buffer is off by one."""
    return float((found - expected).norm() / expected.norm())


def model_on_gpu(unconditional: str = "noise", dtype: torch.dtype = torch.float32) -> NVSModel:
    return tiny_nvs_model(unconditional_support=unconditional).to("cuda").to(dtype)


def poses(seed: int) -> Poses:
    azimuth = torch.rand(VIEWS, generator=torch.Generator().manual_seed(seed)).cuda() * 360
    return Poses(azimuth, azimuth * 0.1, torch.full_like(azimuth, 1.5))


def images(seed: int) -> Tensor:
    return (torch.rand(VIEWS, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1).cuda()


def steps(guidance: ScoreDistillation, count: int = 5) -> list[Tensor]:
    """Gradients of several steps; images, cameras and noise levels change, and in the middle so does the object."""
    found = []
    for step in range(count):
        if step in (0, 3):
            front = Poses(*(torch.tensor([value], device="cuda") for value in (10.0 * step, 5.0, 1.5)))
            guidance.prepare(images(90 + step)[:1], front, torch.Generator("cuda").manual_seed(step))
        views = images(step).requires_grad_()
        result = guidance(views, poses(step), SHARES, torch.Generator("cuda").manual_seed(step))
        found += [result.gradient, *torch.autograd.grad(result.loss, views)]
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unconditional", ["zeros", "noise"])
def test_score_distillation_is_the_same_with_graphs(unconditional: str, dtype: torch.dtype) -> None:
    found = {}
    for graphs in (False, True):
        model = model_on_gpu(unconditional, dtype)
        guidance = ScoreDistillation(model, num_query=4, graphs=graphs, encoder_dtype=dtype)
        found[graphs] = steps(guidance)
        assert len(model.graphs) == graphs
        assert not graphs or (guidance.encoder is not None and len(guidance.encoder._captured) == 1)
    for plain, graphed in zip(found[False], found[True], strict=True):
        assert difference(graphed, plain) < (1e-2 if dtype is torch.float32 else 5e-2)


@pytest.mark.gpu
def test_weights_that_change_in_place_are_seen_and_weights_that_move_are_captured_again() -> None:
    layer = nn.Linear(4, 4).cuda()
    cache, x = GraphCache(enabled=True), torch.randn(2, 4, device="cuda")

    def call() -> Tensor:
        return cache("key", lambda inputs: layer(inputs["x"]), {"x": x}, {}, (layer,))

    for step in range(6):
        layer.weight.data.mul_(1.5)
        if step == 3:
            layer.cpu().cuda()
        with torch.no_grad():
            torch.testing.assert_close(call(), layer(x))
    layer.weight.data = torch.randn(4, 4, device="cuda")
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(call(), layer(x))
    assert len(cache) == 1


@pytest.mark.gpu
def test_inference_mode_may_come_and_go() -> None:
    cache, x, scale = GraphCache(enabled=True), torch.arange(3.0, device="cuda"), torch.tensor(2.0, device="cuda")
    for step in range(6):
        with torch.inference_mode(step % 4 < 2):
            assert torch.equal(cache("key", linear, {"x": x + step}, {"scale": scale}, ()), 2 * (x + step))
    assert len(cache) == 1


@pytest.mark.gpu
def test_an_encoder_that_is_let_go_takes_its_graphs_with_it() -> None:
    encoder, views = FrozenEncoder(model_on_gpu().vae, torch.bfloat16), images(0).requires_grad_()
    gc.disable()  # what only the collector finds stays on the GPU until it happens to run
    try:
        for _ in range(3):
            encoder(views)
        graphs = weakref.ref(next(iter(encoder._captured.values())))
        del encoder
        assert graphs() is None
    finally:
        gc.enable()


@pytest.mark.gpu
def test_constants_are_copied_when_they_are_others_or_changed() -> None:
    cache, scale = GraphCache(enabled=True), torch.tensor(2.0, device="cuda")
    x = torch.arange(3.0, device="cuda")
    results = [cache("key", linear, {"x": x + i}, {"scale": scale}, ()) for i in range(3)]
    assert torch.equal(torch.stack(results), torch.stack([2 * (x + i) for i in range(3)]))
    scale.fill_(3.0)
    assert torch.equal(cache("key", linear, {"x": x}, {"scale": scale}, ()), 3 * x)
    assert torch.equal(cache("key", linear, {"x": x}, {"scale": scale + 1}, ()), 4 * x)
    assert torch.equal(results[0], 2 * x), "a result is not written over by later calls"


@pytest.mark.gpu
def test_what_cannot_be_captured_runs_as_it_is_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    cache, x = GraphCache(enabled=True), torch.arange(1.0, 4.0, device="cuda")

    def refuses(inputs: Mapping[str, Tensor]) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("operation not permitted when stream is capturing")
        return 6 * inputs["x"]

    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            assert torch.equal(cache("key", refuses, {"x": x}, {}, ()), 6 * x)
    assert len(cache) == 0 and len([r for r in caplog.records if "CUDA graphs are off" in r.message]) == 1


@pytest.mark.gpu
def test_the_encoder_keeps_apart_what_several_passes_need() -> None:
    model = model_on_gpu()
    plain, graphed = (FrozenEncoder(model.vae, torch.float32, graphs=graphs) for graphs in (False, True))
    first, second = images(0).requires_grad_(), images(1).requires_grad_()
    for _ in range(3):
        graphed(first)
    results = {}
    for encoder in (plain, graphed):
        a, b = encoder(first), encoder(second)  # the second pass takes the buffers of the first
        gradients = [torch.autograd.grad(a.square().sum(), first, retain_graph=True)[0] for _ in range(2)]
        gradients.append(torch.autograd.grad(b.square().sum(), second)[0])
        results[encoder] = [a, b, *gradients]
    assert len(graphed._captured) == 1
    for expected, found in zip(results[plain], results[graphed], strict=True):
        assert difference(found, expected) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("rotating", [True, False])
def test_sampling_is_the_same_with_graphs(rotating: bool) -> None:
    found = {}
    for graphs in (False, True):
        model = model_on_gpu()
        guidance = ScoreDistillation(model, graphs=graphs)
        front = Poses(*(torch.tensor([value], device="cuda") for value in (0.0, 0.0, 1.5)))
        guidance.prepare(images(0)[:1], front, torch.Generator("cuda").manual_seed(0))
        assert guidance.conditions is not None
        options = SamplingOptions(6, 3.0, rotating_groups=rotating, groups_per_call=1)
        generator = torch.Generator("cuda").manual_seed(1)
        found[graphs] = sample_latents(model, guidance.conditions, poses(0), generator, options)
        assert len(model.graphs) == graphs
    assert difference(found[True], found[False]) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_step_never_waits_for_the_device(graphs: bool, dtype: torch.dtype) -> None:
    model = model_on_gpu(dtype=dtype)
    guidance = ScoreDistillation(model, memory=MemoryPlan(), graphs=graphs, encoder_dtype=torch.bfloat16)
    steps(guidance, 3)
    views, cameras, generator = images(0).requires_grad_(), poses(0), torch.Generator("cuda").manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = guidance(views, cameras, SHARES, generator)
        torch.autograd.grad(result.loss, views)
    finally:
        torch.cuda.set_sync_debug_mode("default")
