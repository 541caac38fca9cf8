"""Networks of so few units that every mask can be tried; between them they have every kind of operation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.toy import IMAGE_SHAPE
from utils.channels.graph import ChannelGraph
from utils.conv_type import sparsify


class Chain(nn.Module):
    """Convs in a row, one with a shift, one not maskable; a flatten that gives each channel four columns."""

    LAYERS = ("conv1", "conv3")

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 3, padding=1, bias=True)
        self.bn = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 2, 1, bias=False)
        self.conv3 = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False)
        self.linear = nn.Linear(4 * 2 * 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(F.max_pool2d(self.bn(self.conv1(x)), 2))
        return self.linear(self.conv3(x).flatten(1))


class Branches(nn.Module):
    """Additions, concatenations, depthwise convs; with tied masks `direct` reads the very units that it writes."""

    LAYERS = ("stem", "direct", "expand", "project", "grow")

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(2)
        self.direct = nn.Conv2d(2, 2, 3, padding=1, bias=True)
        self.bn2 = nn.BatchNorm2d(2)
        self.expand = nn.Conv2d(2, 3, 1, bias=False)
        self.filter = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=True)
        self.project = nn.Conv2d(3, 2, 1, bias=False)
        self.grow = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.wide = nn.Conv2d(7, 7, 3, stride=2, padding=1, groups=7, bias=False)
        self.bn3 = nn.BatchNorm2d(7)
        self.linear = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        image, x = x, self.bn1(self.stem(x))
        x = self.bn2(x + self.direct(x))
        x = x + self.project(F.relu6(self.filter(self.expand(x))))
        x = torch.cat([self.grow(x), x, image], 1)  # with channels that are always there
        return self.linear(self.bn3(self.wide(x)).mean((2, 3)))


class Twice(nn.Module):
    """A conv that runs twice, so that it reads in the end what it writes; a sum of concatenated maps."""

    LAYERS = ("stem", "again", "left", "right")

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2, 1, bias=False)
        self.again = nn.Conv2d(2, 2, 3, padding=1, bias=True)
        self.left = nn.Conv2d(2, 2, 1, bias=False)
        self.right = nn.Conv2d(2, 2, 1, bias=False)
        self.linear = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.again(self.again(x))
        x = torch.cat([x, self.left(y)], 1) + torch.cat([y, self.right(y)], 1)
        return self.linear(F.relu(x).mean((2, 3), keepdim=True)).flatten(1)


SMALL = {"chain": Chain, "branches": Branches, "twice": Twice}


def graph_of(net: type[nn.Module], residual_masks: str = "free") -> ChannelGraph:
    return ChannelGraph(sparsify(net(), list(net.LAYERS), 0.5), IMAGE_SHAPE, residual_masks)
