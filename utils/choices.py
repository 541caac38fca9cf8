"""The names of all choices, which `--list` prints. Nothing here imports torch or what the paths lead to."""

import re
from pathlib import Path
from typing import NamedTuple


class Choice(NamedTuple):
    """What a name stands for, and the import path of its class, for `pkgutil.resolve_name`."""

    about: str
    path: str


SETS = {
    "CIFAR10": "60,000 colour images of 32x32 pixels in 10 classes, downloaded if they are missing",
    "CIFAR100": "60,000 colour images of 32x32 pixels in 100 classes, downloaded if they are missing",
    "MNIST": "70,000 handwritten digits, downloaded if they are missing",
    "FashionMNIST": "70,000 grey images of clothes in 10 classes, downloaded if they are missing",
    "FashionMNIST-mini": "12,000 images of Fashion-MNIST that are part of this repository",
    "ImageFolder": "your own images, in the folders train/<class> and test/<class>",
    "ImageNet": "ImageNet with its 1000 classes, in the folders train/<class> and val/<class>",
}
ARCHS = {
    **{
        f"resnet{depth}": f"ResNet with {depth} layers for CIFAR, 32 to 128 channels wide as in the released code"
        for depth in (20, 32, 44, 56, 110)
    },
    **{
        f"resnet{depth}_he": f"ResNet with {depth} layers for CIFAR, 16 to 64 channels wide as He et al. have them"
        for depth in (8, 20, 32, 44, 56, 110)
    },
    "vgg11": "VGG with 8 convolutions and batch-norm",
    "vgg13": "VGG with 10 convolutions and batch-norm",
    "vgg16": "VGG with 13 convolutions and batch-norm",
    "vgg19": "VGG with 16 convolutions and batch-norm",
    "wrn28_10": "wide residual network with 28 layers, ten times as wide as a ResNet",
    "wrn16_8": "wide residual network with 16 layers, eight times as wide as a ResNet",
    "mobilenet_v1": "MobileNet, whose depthwise layers follow the channels that they filter",
    **{f"resnet{depth}": f"ResNet with {depth} layers for ImageNet, as in torchvision" for depth in (18, 34, 50, 101)},
}
OWN_ARCH = (
    r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"  # of a user's network, as pkgutil.resolve_name
)
OWN_ARCH_WORDS = "PACKAGE.MODULE:FUNCTION for a network of your own"
METHODS = {
    "vrpge": Choice("VR-PGE, computing only the kept channels", "trainers.methods.vrpge:PolicyGradient"),
    "released": Choice("VR-PGE step by step as the released code computes it", "trainers.methods.released:Released"),
    "dense": Choice("the plain network, all of its channels", "trainers.methods.scratch:Dense"),
    "thin": Choice("a narrower network, trained from scratch", "trainers.methods.scratch:Thin"),
    "random": Choice("a random choice of channels, trained from scratch", "trainers.methods.scratch:RandomMask"),
    "coin": Choice("vrpge with coin tosses in place of the losses, as a control", "trainers.methods.vrpge:Coin"),
    "l1": Choice("dense training, then pruning by the norms of the filters", "trainers.methods.pruning:FilterNorm"),
    "slimming": Choice("dense training, then pruning by batch-norm scales", "trainers.methods.pruning:Slimming"),
    "sfp": Choice("filters that are set to zero after each epoch, then pruned", "trainers.methods.pruning:SoftPruning"),
    "taylor_cut": Choice(
        "dense training, then pruning by the first-order effect", "trainers.methods.pruning:TaylorCut"
    ),
    "gumbel": Choice("scores trained by backward passes through soft gates", "trainers.methods.gumbel:Gumbel"),
}
ESTIMATORS = {
    "vrpge": Choice("loss differences, with bounded variance", "utils.algorithm.estimators.vrpge:VRPGEEstimator"),
    "reinforce": Choice("losses without a baseline", "utils.algorithm.estimators.reinforce:Reinforce"),
    "linear_cv_gates": Choice(
        "loss differences minus a linear prediction",
        "utils.algorithm.estimators.linear_cv_gates:LinearControlVariate",
    ),
    "taylor": Choice("a biased estimate from one mask and one pass", "utils.algorithm.estimators.taylor:Taylor"),
}
GATE_ESTIMATORS = ("linear_cv_gates", "taylor")  # learn over many steps from the gradients of backward passes

# Sets of methods that read the same options.
MASKED = tuple(name for name in METHODS if name != "dense")  # know units that can be dropped
TWO_PHASE = tuple(name for name in MASKED if name not in ("thin", "random"))  # choose a subnet, then fine-tune it
SCORED = ("vrpge", "released", "coin", "gumbel")  # train scores
DRAWN = ("vrpge", "released", "coin")  # train them by masks that are drawn from them
ESTIMATED = ("vrpge", "coin")  # and by an estimator that may be exchanged
GRADUAL = ("l1", "slimming", "taylor_cut")  # prune once, or after every epoch while the budget falls
FALLING = (*SCORED, *GRADUAL)  # have a budget that may fall


def is_own(arch: str) -> bool:
    """Whether a network is made by a user's code, and not by a name of `ARCHS`."""
    return ":" in arch


def named_again(arch: str) -> str:
    """What a command has to say again beside a checkpoint: code runs only where it is named."""
    return f" --arch {arch}" if is_own(arch) else ""


def catalogue() -> str:
    """What there is to choose from, a line each."""
    configs = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
    tables = {
        "networks (--arch)": ARCHS,
        "data sets (--set)": SETS,
        "methods (--method)": {name: method.about for name, method in METHODS.items()},
        "estimators (--estimator)": {name: estimator.about for name, estimator in ESTIMATORS.items()},
        "configs (--config)": {f"configs/{path.name}": _first_sentence(path) for path in configs},
    }
    width = max(len(name) for table in tables.values() for name in table)
    return "\n\n".join(
        "\n".join([f"{title}:", *(f"  {name:{width}}  {about}" for name, about in table.items())])
        for title, table in tables.items()
    )


def _first_sentence(path: Path) -> str:
    """Of the comment that a YAML file starts with."""
    lines = path.read_text(encoding="utf-8").partition("\n#\n")[0].splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    return re.split(r"(?<=\.)\s", comment)[0]
