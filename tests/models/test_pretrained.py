"""Starting weights: from files and by torchvision's names, and a sentence for everything that does not fit."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision import models as torchvision_models

from models import build_model
from models.pretrained import SubnetOfRun, find_subnet, load_pretrained, torchvision_weights
from tests.toy import one_thread  # noqa: F401
from utils.conv_type import sparsify, subnet_convs
from utils.errors import UserError

NAME = "ResNet18_Weights.IMAGENET1K_V1"


def network(arch: str, num_classes: int, image_size: int, width_mult: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    return build_model(arch, num_classes, 3, image_size, width_mult)


def small(arch: str = "resnet20", num_classes: int = 10, image_size: int = 32, width_mult: float = 0.125) -> nn.Module:
    return network(arch, num_classes, image_size, width_mult)


def saved(state: object, path: Path) -> str:
    torch.save(state, path)
    return str(path)


@pytest.fixture(autouse=True)
def downloads(monkeypatch, tmp_path) -> list[str]:
    """An empty cache and no network: the addresses that were asked for."""
    asked: list[str] = []

    def refuse(request, *_args, **_kwargs):
        asked.append(request.full_url)
        raise URLError("no network in tests")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    return asked


@pytest.fixture
def cached(tmp_path) -> nn.Module:
    """torchvision's network, whose weights lie where a download would have put them."""
    torch.manual_seed(1)
    theirs = torchvision_models.resnet18().eval()
    # files of torchvision's first weights are older than the counters of batch-norms
    state = {key: value for key, value in theirs.state_dict().items() if "num_batches_tracked" not in key}
    folder = tmp_path / "torch/hub/checkpoints"
    folder.mkdir(parents=True)
    torch.save(state, folder / Path(torchvision_models.get_weight(NAME).url).name)
    return theirs


@pytest.mark.parametrize("masks", [True, False])
def test_weights_by_name_make_torchvisions_network(cached, downloads, masks):
    model = network("resnet18", 1000, 224).eval()
    model = sparsify(model) if masks else model
    load_pretrained(model, "ResNet18_Weights.DEFAULT")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), cached(images))
    assert len(subnet_convs(model)) == 20 * masks
    assert all((conv.scores == 0.5).all() for conv in subnet_convs(model).values())
    assert not downloads


def test_every_arch_with_weights_has_names():
    names = torchvision_weights()
    assert names["ResNet50_Weights.IMAGENET1K_V2"] == "resnet50"
    assert names["VGG16_BN_Weights.DEFAULT"] == "vgg16_bn"
    for name in names:
        torchvision_models.get_weight(name)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("ResNet18_Weights.IMAGENET1K_V2", "ResNet18_Weights.IMAGENET1K_V1"),
        ("resnet18_weights.default", "ResNet18_Weights.DEFAULT"),
        ("VGG16BN_Weights", "VGG16_BN_Weights.DEFAULT"),
        ("ResNet50_Weights", "ResNet50_Weights.DEFAULT"),
        ("models/nowhere.pt", "one is ResNet50_Weights.DEFAULT"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, nearest, downloads):
    with pytest.raises(UserError) as caught:
        load_pretrained(small(), name)
    assert str(caught.value).startswith(f"--pretrained {name}: there is no such file, and torchvision has no weights")
    assert nearest in str(caught.value)
    assert not downloads


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        (
            lambda: network("resnet18", 1000, 224),
            "ResNet50_Weights.IMAGENET1K_V2",
            "layer1.0.conv3.weight is unknown; .*they are for torchvision's resnet50: width_mult 1",
        ),
        (lambda: small("vgg11", 1000, 224, 0.25), "VGG11_BN_Weights.DEFAULT", "features.0.weight has shape"),
        (
            lambda: network("resnet18", 1000, 32),
            NAME,
            r"\(conv1.weight has shape \(64, 3, 7, 7\), the network \(64, 3, 3, 3\)\); .*, large images in colour",
        ),
        (lambda: small("vgg11", 1000, 224), "VGG11_Weights.DEFAULT", "for torchvision's vgg11: width_mult 1"),
    ],
    ids=["arch", "width", "small images", "no batch-norms"],
)
def test_names_that_do_not_fit_are_refused_before_a_download(model, name, message, downloads):
    with pytest.raises(UserError, match=f"^--pretrained {name}: .*{message}"):
        load_pretrained(model(), name)
    assert not downloads


def test_a_failed_download_names_the_address_and_another_way(downloads):
    url = torchvision_models.get_weight(NAME).url
    message = f"{url} could not be downloaded .*no network in tests.*pass its path"
    with pytest.raises(UserError, match=message):
        load_pretrained(network("resnet18", 1000, 224), NAME)
    assert downloads == [url]


def test_a_damaged_file_in_the_cache_is_named(tmp_path, downloads):
    folder = tmp_path / "torch/hub/checkpoints"
    folder.mkdir(parents=True)
    (folder / Path(torchvision_models.get_weight(NAME).url).name).write_bytes(b"cut off")
    with pytest.raises(UserError, match=f"or read from {re.escape(str(tmp_path))}"):
        load_pretrained(network("resnet18", 1000, 224), NAME)
    assert not downloads


def test_a_file_goes_before_a_name(tmp_path, monkeypatch, downloads):
    theirs = small()
    nn.init.ones_(theirs.linear.weight)
    monkeypatch.chdir(tmp_path)
    model = small()
    load_pretrained(model, Path(saved(theirs.state_dict(), tmp_path / NAME)).name)
    assert (model.linear.weight == 1).all()
    assert not downloads


@pytest.mark.parametrize(("arch", "image_size"), [("resnet20", 32), ("vgg11", 32), ("vgg11", 224), ("resnet18", 32)])
def test_for_other_classes_all_but_the_head_is_taken_over(arch, image_size, tmp_path, capsys):
    theirs, model = small(arch, 10, image_size), small(arch, 7, image_size)
    for value in theirs.state_dict().values():
        value += 1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = saved({"model": theirs.state_dict()}, tmp_path / "ten.pt")
    load_pretrained(model, path)
    assert (
        f"{path} tells 10 classes apart and the data have 7, so layer {model.head_name} starts"
        in capsys.readouterr().out
    )
    for name, value in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            expected = before if name.startswith(f"{model.head_name}.") else theirs.state_dict()
            assert torch.equal(value, expected[name]), name


def test_a_head_that_reads_another_width_does_not_fit(tmp_path):
    theirs = small(num_classes=7).state_dict()
    theirs["linear.weight"] = torch.zeros(7, 3)
    with pytest.raises(UserError, match=r"linear.weight has shape \(7, 3\)"):
        load_pretrained(small(), saved(theirs, tmp_path / "seven.pt"))


def test_torchvisions_weights_start_a_network_for_ones_own_classes(cached, downloads, capsys):
    model = network("resnet18", 10, 224)
    load_pretrained(model, "ResNet18_Weights.DEFAULT")
    assert torch.equal(model.conv1.weight, cached.conv1.weight)
    assert "tells 1000 classes apart and the data have 10" in capsys.readouterr().out
    assert not downloads


def test_other_misfits_are_named_and_counted(tmp_path):
    path = saved(small(width_mult=0.25).state_dict(), tmp_path / "wide.pt")
    message = r"\(conv1.weight has shape \(8, 3, 3, 3\), the network \(4, 3, 3, 3\); .* and \d+ more\); use the arch"
    with pytest.raises(UserError, match=message):
        load_pretrained(small(), path)
    path = saved(small("vgg11").state_dict(), tmp_path / "vgg.pt")
    with pytest.raises(UserError, match=r"do not fit this network \(conv1.weight is missing; "):
        load_pretrained(small(), path)


def test_what_a_file_stands_for_does_not_depend_on_which_units_happen_to_have_left(tmp_path, monkeypatch):
    """The subnet of a run that lets units leave, else all weights."""
    everything, some = torch.ones(12, dtype=bool), torch.arange(12) >= 3

    def found(units: torch.Tensor, name: str = "best.pt", **config: object) -> SubnetOfRun | None:
        stored = {"method": "vrpge", "execution": "compact", "shrink": True, **config}
        state = {"model": {}, "stored_units": units, "config": stored, "subnet": {"mask": some}}
        if name == "last.pt":
            state |= {"weight_optimizer": {}, "subnet": None}
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        path = saved(state, tmp_path / "checkpoints" / name)
        return find_subnet(path)

    for units in (everything, some):
        assert torch.equal(found(units).state["subnet"]["mask"], some)
        assert found(units, method="thin") is not None
        with pytest.raises(UserError, match=r"last.pt: it holds a run to go on with.*checkpoints/best.pt"):
            found(units, "last.pt")
    assert found(everything, shrink=False) is None
    assert found(everything, "last.pt", shrink=False) is None
    assert found(everything, execution="masked") is None
    assert found(everything, method="released") is None
    assert found(torch.ones(0, dtype=bool), method="dense") is None
    assert found(some, shrink=False, method="thin") is not None
    found(some)
    for path in (".", str(tmp_path), "checkpoints/best.pt"):  # the result of a run folder
        monkeypatch.chdir(tmp_path)
        assert find_subnet(path).source.endswith("checkpoints/best.pt")
    assert find_subnet("ResNet18_Weights.DEFAULT") is None
    assert find_subnet(saved(small().state_dict(), tmp_path / "plain.pt")) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a checkpoint", "not a readable checkpoint or state dict"),
        ([1, 2], "holds no state dict"),
        ({"epoch": 3}, "holds no state dict"),
    ],
)
def test_files_without_weights_are_refused(content, message, tmp_path):
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=message):
        load_pretrained(small(), str(path))
