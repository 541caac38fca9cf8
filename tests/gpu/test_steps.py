"""Training steps on a GPU: the numbers of the CPU, a host that does not wait, and what bf16 changes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from args import ARCHS
from tests.gpu.card import BATCH, CPU, GPU, ON_GPU, images_on, mean_loss, run_on, shapes, take_step
from tests.toy import NETWORKS, batch, config, flat_mask, plain_net, search_of, sparse_network
from trainers.build import restore_model, restore_run
from trainers.default import StepSettings, backward_, draw_masks, evaluate, train_step
from trainers.state import RunState
from utils.channels.shrink import drop_dead_units
from utils.run import checkpoint

pytestmark = ON_GPU

# ---- the numbers of the CPU ----


def numbers_of_a_step(device: torch.device, kind: str, execution: str) -> dict[str, Tensor]:
    """Metrics, weights, statistics and scores after a step in float64, on the host."""
    layers = NETWORKS[kind].LAYERS
    network = sparse_network(plain_net(kind), layers, execution, device=str(device), multiple=8)
    network.model.train()
    options = config()
    masks_KU = torch.from_numpy(np.stack([flat_mask(layers, {}, seed) for seed in (1, 2)])).to(device)
    search = search_of(network, options, masks_KU=masks_KU)
    images, labels = (part.to(device) for part in batch())
    metrics = train_step(search, images, labels, StepSettings(0.1, 0.05, 0.4), options).metrics
    assert all(value.device == network.device for value in metrics.values())
    gradients = {f"gradient of {name}": p.grad for name, p in network.model.named_parameters() if p.grad is not None}
    scores = {"scores": network.scores, "gradient of scores": network.scores.grad}
    tensors = {**metrics, **gradients, **scores, **network.model.state_dict()}
    return {name: value.detach().cpu().double() for name, value in tensors.items()}


@pytest.mark.parametrize("execution", ["compact", "masked"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_step_gives_the_numbers_of_the_cpu(kind, execution):
    expected, actual = (numbers_of_a_step(device, kind, execution) for device in (CPU, GPU))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


# ---- the host does not wait ----


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, whatever makes the host wait for the GPU is an error, except waiting for an event."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


FLOWS = [
    {},
    {"residual_masks": "tied"},
    {"K": 4},
    {"constrain_by_layer": True},
    {"estimator": "reinforce"},
    {"score_gradient": "tangent"},
    {"method": "dense"},
    {"method": "thin"},
    {"method": "l1"},
    {"method": "slimming"},
    {"method": "coin"},
    {"method": "gumbel"},
    # These waited when a card was there. On the emulated device they no longer do.
    {"estimator": "linear_cv_gates"},
    {"estimator": "taylor"},
    {"execution": "masked"},
    {"method": "released"},
    {"budget": "flops"},
    {"budget": "params"},
    {"score_gradient": "tangent", "budget": "flops"},
]
# Each reads a tensor on the host, or sends one to the GPU and waits until it is there.
WAITS = [{"method": "taylor_cut"}]
KNOWN = pytest.mark.xfail(
    strict=True, reason="the host is known to wait here; one that waits no more belongs into FLOWS"
)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("options", [*FLOWS, *(pytest.param(options, marks=KNOWN) for options in WAITS)], ids=str)
def test_the_host_waits_for_nothing_but_the_masks(options, precision):
    run, settings = run_on(GPU, precision=precision, **options)
    images_and_labels = images_on(GPU)
    for _ in range(3):
        take_step(run, settings, images_and_labels)
    with no_waiting():
        take_step(run, settings, images_and_labels)


def test_the_host_reads_the_masks_only_when_they_have_arrived():
    run, settings = run_on(GPU, arch="vgg16", width_mult=0.25)
    search = run.search
    spare = [draw_masks(search, settings) for _ in range(4)]  # memory for masks, because to ask for more may wait
    torch.cuda.synchronize()
    del spare
    for _ in range(5):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second
        masks = draw_masks(search, settings)
        assert not masks.on_host.arrived.query(), "the copy was over before it was asked for"
        planned = [plan.mask_U.tolist() for plan in masks.plans(run.network)]  # at once: it may be a view of the copy
        expected = masks.own_KU.cpu().numpy()
        assert planned == expected.tolist()
        assert not np.array_equal(*expected)


# ---- bf16 ----


@pytest.mark.parametrize(("arch", "width_mult"), [("resnet20", 0.5), ("vgg16", 0.25)])
def test_a_step_in_bf16_is_near_the_one_in_fp32(arch, width_mult):
    losses, gradients = [], []
    for precision in ("fp32", "bf16"):
        run, settings = run_on(GPU, arch=arch, width_mult=width_mult, precision=precision)
        losses.append(mean_loss(take_step(run, settings, images_on(GPU))))
        weights = run.network.weight_parameters()
        assert {weight.dtype for weight in weights} == {torch.float32}
        gradients.append(torch.cat([weight.grad.flatten() for weight in weights]))
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert losses[1] != losses[0]
    assert F.cosine_similarity(*gradients, dim=0) > 0.75  # about 0 for unrelated ones


LARGE_FORMS = [(arch, 128) for arch in ("vgg16", "mobilenet_v1", "resnet18", "resnet34", "resnet50", "resnet101")]


@pytest.mark.parametrize(("arch", "size"), [*((arch, 32) for arch in ARCHS), *LARGE_FORMS])
def test_every_network_trains_in_bf16(arch, size):
    run, settings = run_on(GPU, size, arch=arch, width_mult=0.125, precision="bf16")
    before = run.network.weight_parameters()[0].detach().clone()
    for seed in (1, 2):
        result = take_step(run, settings, images_on(GPU, size, seed))
        assert len(result.forward) == 2
        assert math.isfinite(mean_loss(result))
    assert not torch.equal(run.network.weight_parameters()[0], before)


# ---- checkpoints ----


def tensors_of(run: RunState) -> list[Tensor]:
    """Weights, statistics and scores."""
    return list(run.network.model.state_dict().values())


def test_a_checkpoint_goes_on_on_the_gpu_and_is_read_on_the_cpu(tmp_path):
    run, settings = run_on(GPU)
    images_and_labels, search = images_on(GPU), run.search
    for _ in range(3):
        take_step(run, settings, images_and_labels)
    run.network.scores.data[::3] = 0
    search.masks = draw_masks(search, settings)
    assert drop_dead_units(run.network, search.score_optimizer, search.weight_optimizer) > 0
    take_step(run, settings, images_and_labels)
    checkpoint.save(tmp_path / "last.pt", run.state_dict(settings, shapes()))
    stored = checkpoint.load(tmp_path / "last.pt")

    again, _ = run_on(GPU)
    restore_run(again, stored, settings)
    assert torch.equal(again.search.masks.own_KU, search.masks.own_KU)
    assert torch.equal(again.search.generator.get_state(), search.generator.get_state())
    assert all(torch.equal(a, b) for a, b in zip(*map(tensors_of, (run, again)), strict=True))
    losses = [mean_loss(take_step(r, settings, images_and_labels)) for r in (run, again)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for one, other in zip(*map(tensors_of, (run, again)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)

    results = []
    for device in (GPU, CPU):
        fresh, _ = run_on(device)
        restore_model(fresh.network, stored)
        plan = fresh.network.plan(fresh.network.stored_units)
        results.append(evaluate(fresh.network, plan, [images_on(device)]))
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=0.02)  # convolutions on a GPU have 10 bits


# ---- CUDA graphs; last in this file, because a capture that fails may leave traces ----


@pytest.mark.parametrize("options", [{"method": "dense"}, {"method": "thin"}, {}], ids=["dense", "thin", "one mask"])
def test_a_captured_pass_gives_the_loss_and_the_gradients_of_an_eager_one(options):
    run, _ = run_on(GPU, **options)
    network = run.network
    plan = run.plan if run.search is None else run.search.masks.plans(network)[0]
    images, labels = images_on(GPU)

    def forward_and_backward() -> Tensor:
        loss = F.cross_entropy(network(images, plan), labels)
        backward_(network, loss, BATCH)
        return loss.detach()

    def results(loss: Tensor) -> list[Tensor]:
        return [loss.clone(), *(weight.grad.clone() for weight in network.weight_parameters())]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward_and_backward()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured_loss = forward_and_backward()
    captured = [captured_loss, *(weight.grad for weight in network.weight_parameters())]
    for seed in (2, 3):
        images.copy_(images_on(GPU, seed=seed)[0])
        graph.replay()
        replayed = [value.clone() for value in captured]
        eager = results(forward_and_backward())
        for one, other in zip(replayed, eager, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)
