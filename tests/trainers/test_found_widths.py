"""`--method thin --widths-of RUN`: the channels that another run found, and nothing of its weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from args import Config, config_from_dict
from data import DataSplits
from main import main
from tests.tiny import TINY, Run, kept_mask, make_images, run
from trainers.build import new_run, with_layout_of_start
from trainers.session import load_data
from trainers.state import RunState
from utils.errors import UserError
from utils.run.checkpoint import differences

CPU = torch.device("cpu")
SHORT = {"epochs": 1, "finetune_epochs": 1}
SOURCES = {
    "free": {"score_lr": 0.3},  # layers that are added keep different channels
    "tied": {"method": "coin", "residual_masks": "tied", "budget": "flops", "keep_ratio": 0.4, "score_lr": 0.3},
    "whole": {"method": "l1", "shrink": "off", "keep_ratio": 0.3},  # no unit has left its weights
}
SAME = ("keep_ratio", "budget")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def sources(images, tmp_path_factory) -> dict[str, Run]:
    root = tmp_path_factory.mktemp("sources")
    return {name: run(root, images, name=name, **{**SHORT, **options}) for name, options in SOURCES.items()}


@pytest.fixture(scope="module")
def data(images) -> DataSplits:
    return load_data(config_from_dict({**TINY, "data": str(images)}, "test"), CPU)


def config_of(images: Path, source: Run | Path, **options: object) -> Config:
    folder = source.folder if isinstance(source, Run) else source
    given = {"method": "thin", "widths_of": str(folder), "data": str(images)}
    if isinstance(source, Run):
        given |= {key: source.load("best.pt")["config"][key] for key in SAME}
    return config_from_dict({**TINY, **given, **options}, "test")


def started(images: Path, data: DataSplits, source: Run | Path, **options: object) -> RunState:
    return new_run(with_layout_of_start(config_of(images, source, **options)), data, CPU)


def weights_of(new: RunState) -> dict[str, torch.Tensor]:
    return {name: value for name, value in new.network.model.state_dict().items() if not name.endswith("scores")}


@pytest.mark.parametrize("name", SOURCES)
def test_every_layer_has_the_channels_of_the_subnet_and_its_flops(images, data, sources, name):
    """Also where residual masks are tied, which the new run is not told."""
    source, new = sources[name], started(images, data, sources[name])
    best, network = source.load("best.pt"), new.network
    assert np.array_equal(new.subnet.mask_U, kept_mask(best))
    assert network.graph.layer_widths(new.plan.counts) == best["widths"]
    assert network.subnet_macs(new.plan) / network.dense_macs == source.summary["flops_ratio"]
    assert network.subnet_parameters(new.plan) / network.dense_parameters == source.summary["params_kept"]
    for op in network.graph.ops:
        if op.kind == "conv":
            assert op.module.weight.shape[0] == best["widths"][str(op.node.target)]


def test_the_layers_that_are_added_keep_different_channels(sources):
    """Otherwise the number of channels of each of them would be enough."""
    best = sources["free"].load("best.pt")
    stored = best["widths"]
    assert len({stored["conv1"], stored["layer1.0.conv2"]}) == 2


def test_the_weights_are_drawn_from_the_seed_and_are_not_those_of_the_run(images, data, sources, tmp_path):
    source = sources["free"]
    other = tmp_path / "other/checkpoints/best.pt"
    other.parent.mkdir(parents=True)
    best, new = source.load("best.pt"), started(images, data, source)
    cut = {
        "stored_units": best["subnet"]["mask"],
        "model": {n: 3 * v for n, v in new.network.model.state_dict().items()},
    }
    torch.save({**best, **cut}, other)  # weights that would fit
    ours = weights_of(new)
    assert differences(ours, weights_of(started(images, data, source, widths_of=str(other)))) == []
    assert not torch.equal(ours["conv1.weight"], weights_of(started(images, data, source, seed=1))["conv1.weight"])
    norms = [name for name in ours if "running_var" in name or ("bn" in name and name.endswith("weight"))]
    assert norms
    assert all((ours[name] == 1).all() for name in norms)
    convs = [value for value in ours.values() if value.dim() == 4 and value.numel()]
    scaled = torch.cat([(value * (value[0].numel() / 2) ** 0.5).flatten() for value in convs])
    assert float(scaled.std()) == pytest.approx(
        1, abs=0.1
    )  # kaiming_normal, with the fans of the channels that are there


def test_a_run_needs_its_source_only_to_start(images, tmp_path, sources, capsys):
    """It is interrupted, its source is deleted, and it ends like one that was not interrupted."""
    folder = tmp_path / "source"
    shutil.copytree(sources["free"].folder, folder)
    settings = {**SHORT, "method": "thin", "widths_of": folder, "save_every": 0}
    whole = run(tmp_path, images, name="whole", **settings)
    told = f"widths of {folder}/checkpoints/best.pt: {kept_mask(sources['free'].load('best.pt')).sum()} of"
    assert told in capsys.readouterr().out
    assert whole.summary["flops_ratio"] == sources["free"].summary["flops_ratio"]
    assert whole.summary["train_flops_ratio"] < 1.5 * whole.summary["flops_ratio"]
    assert (whole.summary["method"], whole.summary["keep_ratio"]) == ("thin", 0.5)
    assert run(tmp_path, images, name="parts", interrupt_at=1, **settings).code == 130
    assert main(["--dry-run", "--config", str(tmp_path / "tiny.yaml"), "--data", str(images)]) == 0
    shutil.rmtree(folder)
    parts = run(tmp_path, images, "--resume", name="parts", **settings)
    assert parts.code == 0
    for file in ("last.pt", "best.pt"):
        assert {name.partition("config")[0] for name in differences(whole.load(file), parts.load(file))} <= {
            "",
            "best.",
        }
    capsys.readouterr()
    assert main(["--evaluate", "--resume", str(parts.folder)]) == 0
    assert f"test top-1 {whole.summary['test_top1']:.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 0.4}, r"it was trained with keep_ratio 0\.5, not 0\.4; pass --keep-ratio 0\.5"),
        ({"budget": "flops"}, "it was trained with budget channels, not flops; pass --budget channels"),
        ({"width_mult": 0.5}, r"it was trained with width_mult 0\.25, not 0\.5; pass --width-mult 0\.25"),
        ({"arch": "resnet20_he"}, "it was trained with arch resnet8_he, not resnet20_he; pass --arch resnet8_he"),
        ({"first_layer_dense": True}, "first_layer_dense off, not on; pass --first-layer-dense off"),
        ({"widths_of": "nowhere"}, "--widths-of nowhere: does not exist; pass a run folder"),
    ],
)
def test_the_subnet_of_another_network_is_refused(images, data, sources, options, message):
    with pytest.raises(UserError, match=message) as caught:
        started(images, data, sources["free"], **options)
    assert str(caught.value).startswith("--widths-of ")
    assert "\n" not in str(caught.value)


def test_other_images_are_refused_because_the_layers_would_cost_something_else(images, sources):
    others = SimpleNamespace(image_size=16, channels=3, num_classes=5)
    differing = "image_size 8 instead of 16, classes 6 instead of 5; use the same kind"
    with pytest.raises(UserError, match=f"it was trained on images of another kind, with {differing}"):
        started(images, others, sources["free"])


def test_what_has_no_subnet_is_refused(images, data, sources, tmp_path):
    plain, last = tmp_path / "plain.pt", sources["free"].folder / "checkpoints/last.pt"
    torch.save({"weight": torch.ones(1)}, plain)
    dense = tmp_path / "dense.pt"
    best = sources["free"].load("best.pt")
    torch.save({**best, "config": {**best["config"], "method": "dense"}}, dense)
    for path, message in (
        (plain, "it is no checkpoint of a run"),
        (last, "it holds a run to go on with, and not its result"),
        (dense, "method dense keeps all channels that it starts with; pass a run of another method"),
    ):
        with pytest.raises(UserError, match=f"^--widths-of {path}: {message}"):
            started(images, data, path)
