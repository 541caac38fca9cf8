"""The networks of CIFAR repositories, small: each with the spellings that people use, which differ on purpose."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10
W = 8  # channels at the start


class VGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers, channels = [], 3
        for width in (W, 0, 2 * W, 2 * W, 0):
            if width == 0:
                layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.AvgPool2d(kernel_size=1, stride=1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(2 * W * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.features(x)
        out = out.view(out.size(0), -1)
        return self.classifier(out)


class LeNet(nn.Module):
    """Convolutions with bias and without batch-norm, and several linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, W, 3)
        self.fc1, self.fc2 = nn.Linear(W * 2 * 2, 12), nn.Linear(12, CLASSES)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = torch.flatten(x, start_dim=1)
        return self.fc2(self.dropout(F.relu(self.fc1(x))))


class ResNet(nn.Module):
    """The block twice: with an identity, and with a projection of half the size."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, W, 3, padding=1, bias=False), nn.BatchNorm2d(W)
        self.layers = nn.Sequential(block(W, W, 1), block(W, 2 * W, 2))
        self.linear = nn.Linear(2 * W, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(F.relu(self.bn1(self.conv1(x))))
        out = F.avg_pool2d(out, out.size(3))
        out = out.view(out.shape[0], -1)
        return self.linear(out)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        inner = outputs // 2
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x)
        return F.relu(out)


class NextBlock(Bottleneck):
    """That of ResNeXt."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs, stride, groups=2)


class PreActivated(nn.Module):
    """With squeeze-and-excitation by convolutions, as the SENet of CIFAR repositories has it."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
        self.fc1, self.fc2 = nn.Conv2d(outputs, outputs // 4, 1), nn.Conv2d(outputs // 4, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        bypass = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        w = F.avg_pool2d(out, out.size(2))
        w = F.relu(self.fc1(w))
        w = F.sigmoid(self.fc2(w))
        out = out * w
        out += bypass
        return out


class LinearGate(nn.Module):
    """Squeeze-and-excitation by linear layers, with the shapes taken apart."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // 2, bias=False), nn.ReLU(inplace=True), nn.Linear(channels // 2, channels),
            nn.Hardsigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


class GatedBlock(nn.Module):
    """That of SE-ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs)
        self.se = LinearGate(outputs)
        self.shortcut = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.se(self.bn2(self.conv2(out))) + self.shortcut(x))


class PaddedBlock(nn.Module):
    """The shortcut without parameters (option A): every second pixel, and channels of zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.more = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more, self.more), "constant", 0)
        return F.relu(out + x)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, W, 3, padding=1, bias=False)
        self.dense1, self.dense2 = self.layer(W), self.layer(W + 4)
        self.bn, self.transition = nn.BatchNorm2d(W + 8), nn.Conv2d(W + 8, W, 1, bias=False)
        self.last, self.linear = nn.BatchNorm2d(W), nn.Linear(W, CLASSES)

    @staticmethod
    def layer(channels: int) -> nn.Sequential:
        return nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 12, 1, bias=False),
            nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 4, 3, padding=1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        for layer in (self.dense1, self.dense2):
            out = torch.cat([layer(out), out], 1)
        out = F.avg_pool2d(self.transition(F.relu(self.bn(out))), 2)
        out = F.relu(self.last(out)).mean([2, 3])
        return self.linear(out)


class DLA(nn.Module):
    """One tree: two blocks, and a root that reads both of them side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Conv2d(3, W, 3, padding=1, bias=False), nn.BatchNorm2d(W), nn.ReLU(True))
        self.left, self.right = Bottleneck(W, 2 * W, 2), Bottleneck(2 * W, 2 * W, 1)
        self.root = nn.Conv2d(4 * W, 2 * W, 1, bias=False)
        self.bn, self.linear = nn.BatchNorm2d(2 * W), nn.Linear(2 * W, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.base(x)
        out1 = self.left(x)
        out2 = self.right(out1)
        xs = [out1, out2]
        out = F.relu(self.bn(self.root(torch.cat(xs, 1))))
        out = F.adaptive_avg_pool2d(out, (1, 1)).squeeze(-1).squeeze(-1)
        return self.linear(out)


class Inverted(nn.Module):
    """The block of MobileNetV2 and of EfficientNet, which has a gate and swish."""

    def __init__(self, inputs: int, outputs: int, stride: int, gated: bool) -> None:
        super().__init__()
        inner = 2 * inputs
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.se1, self.se2 = (nn.Conv2d(inner, 4, 1), nn.Conv2d(4, inner, 1)) if gated else (None, None)
        self.conv3, self.bn3 = nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.skips = stride == 1 and inputs == outputs
        self.drop_rate = 0.2

    def forward(self, x: Tensor) -> Tensor:
        act = swish if self.se1 is not None else F.relu6
        out = act(self.bn2(self.conv2(act(self.bn1(self.conv1(x))))))
        if self.se1 is not None:
            gate = self.se2(swish(self.se1(F.adaptive_avg_pool2d(out, 1))))
            out = gate.sigmoid() * out
        out = self.bn3(self.conv3(out))
        if self.skips:
            out = F.dropout(out, p=self.drop_rate, training=self.training) + x
        return out


def swish(x: Tensor) -> Tensor:
    return x * x.sigmoid()


class Mobile(nn.Module):
    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, W, 3, padding=1, bias=False), nn.BatchNorm2d(W)
        self.layers = nn.Sequential(Inverted(W, W, 1, gated), Inverted(W, 12, 2, gated))
        self.linear = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(F.relu(self.bn1(self.conv1(x))))
        out = F.adaptive_avg_pool2d(out, 1)
        return self.linear(out.reshape(out.size()[0], -1))


class RegBlock(nn.Module):
    """Grouped, with a gate: the block of RegNetY."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, 1, groups=outputs // 4, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.se1, self.se2 = nn.Conv2d(outputs, 4, 1), nn.Conv2d(4, outputs, 1)
        self.conv3, self.bn3 = nn.Conv2d(outputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = out * self.se2(F.relu(self.se1(out.mean((2, 3), keepdim=True)))).sigmoid()
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


def shuffled(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.size()
    return x.view(n, groups, c // groups, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)


class ShuffleBlock(nn.Module):
    """That of ShuffleNetV2: half of the channels pass, the others are convolved, then all are shuffled."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half, self.stride = outputs // 2, stride
        read = inputs if stride > 1 else inputs // 2
        self.branch = nn.Sequential(
            nn.Conv2d(read, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(),
            nn.Conv2d(half, half, 3, stride, 1, groups=half, bias=False), nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(),
        )  # fmt: skip
        self.other = nn.Sequential(nn.Conv2d(inputs, half, 1, stride), nn.BatchNorm2d(half)) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        if self.other is None:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat([x1, self.branch(x2)], 1)
        else:
            out = torch.cat([self.other(x), self.branch(x)], 1)
        return shuffled(out, 2)


class NormLast(nn.Module):
    """A layer norm over the channels of a map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    """With 1x1 convolutions behind the norm, a scale for every channel, and a path that is dropped."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(inputs, outputs, stride, stride)
        self.depthwise = nn.Conv2d(outputs, outputs, 5, padding=2, groups=outputs)
        self.norm = NormLast(outputs)
        self.expand, self.project = nn.Conv2d(outputs, 2 * outputs, 1), nn.Conv2d(2 * outputs, outputs, 1)
        self.gamma = nn.Parameter(torch.full((outputs, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        out = self.project(F.gelu(self.expand(self.norm(self.depthwise(x)))))
        return x + self.gamma * out


class Inception(nn.Module):
    """Branches side by side, some of them pooled, with an auxiliary head in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, W, 3, padding=1)
        self.b1 = nn.Sequential(nn.Conv2d(W, 4, 1), nn.BatchNorm2d(4), nn.ReLU(True))
        self.b2 = nn.Sequential(nn.Conv2d(W, 6, 1), nn.ReLU(True), nn.Conv2d(6, 4, 3, padding=1), nn.ReLU(True))
        self.b3 = nn.Sequential(nn.MaxPool2d(3, 1, padding=1), nn.Conv2d(W, 4, 1), nn.ReLU(True))
        self.aux = nn.Sequential(nn.Conv2d(12, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 64, CLASSES))
        self.linear = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = F.max_pool2d(self.stem(x), 2)
        x = torch.cat([self.b1(x), self.b2(x), self.b3(x)], dim=1)
        logits = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return (logits, self.aux(x)) if self.training else logits


class Fire(nn.Module):
    """SqueezeNet: the last layer is a convolution, and its channels are the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.squeeze = nn.Conv2d(3, W, 3, stride=2), nn.Conv2d(W, 4, 1)
        self.expand1, self.expand3 = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 3, padding=1)
        self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(12, CLASSES, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor, features: Tensor | None = None) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), kernel_size=3, stride=2, ceil_mode=True)
        x = F.relu(self.squeeze(x))
        x = torch.cat([F.relu(self.expand1(x)), F.relu(self.expand3(x))], 1)
        x = x if features is None else x + features
        return torch.flatten(self.classifier(x), 1)


class Separable(nn.Module):
    """A cell of PNASNet: two filters of one map are added, and both halves are put side by side."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.sep1 = nn.Conv2d(inputs, outputs, 5, stride, 2, groups=math.gcd(inputs, outputs), bias=False)
        self.bn1, self.conv1 = nn.BatchNorm2d(outputs), nn.Conv2d(inputs, outputs, 1, 1, 0, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(2 * outputs, outputs, 1, bias=False)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y1 = self.bn1(self.sep1(x))
        y2 = self.bn2(self.conv1(F.max_pool2d(x, kernel_size=3, stride=self.stride, padding=1)))
        return F.relu(self.conv2(torch.cat([F.relu(y1 + y2), y2], 1)))


ZOO: dict[str, Callable[[], nn.Module]] = {
    "vgg": VGG,
    "lenet": LeNet,
    "resnet": lambda: ResNet(Bottleneck),
    "resnet option a": lambda: ResNet(PaddedBlock),
    "resnext": lambda: ResNet(NextBlock),
    "preact senet": lambda: ResNet(PreActivated),
    "se resnet": lambda: ResNet(GatedBlock),
    "densenet": DenseNet,
    "dla": DLA,
    "mobilenet v2": lambda: Mobile(gated=False),
    "efficientnet": lambda: Mobile(gated=True),
    "regnet": lambda: ResNet(RegBlock),
    "shufflenet v2": lambda: ResNet(ShuffleBlock),
    "convnext": lambda: ResNet(ConvNextBlock),
    "googlenet": Inception,
    "squeezenet": Fire,
    "pnasnet": lambda: ResNet(Separable),
}
IMAGE_SHAPE = (3, 16, 16)
