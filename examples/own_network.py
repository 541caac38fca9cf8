"""Makes a network of your own channel-sparse and trains it: `python -m examples.own_network`.

Two calls prepare any convolutional network. `sparsify` gives every convolution scores, one for each output channel.
`SparseNetwork` traces how channels flow through additions and concatenations. It leaves the layers around operations
that it cannot follow dense, and says which. The rest is a training loop around `train_step`.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from args import Config, SparsityConfig
from trainers.build import make_estimator
from trainers.default import StepSettings, draw_masks, train_step
from trainers.session import load_data
from trainers.state import Search
from utils.channels.budget import Budget
from utils.channels.network import SparseNetwork
from utils.conv_type import sparsify

KEEP_RATIO, STEPS, BATCH_SIZE = 0.5, 100, 64


class OwnNetwork(nn.Module):
    """A plain PyTorch network that knows nothing of masks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(32, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(64, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.linear = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.down(self.stem(images))
        return self.linear((x + self.branch(x)).mean((2, 3)))


def main() -> None:
    """Trains on the bundled images for some steps and prints what the masks keep. Takes no options but --help."""
    argparse.ArgumentParser(prog="python -m examples.own_network", description=__doc__).parse_args()
    torch.manual_seed(0)
    model = sparsify(OwnNetwork(), score_init=KEEP_RATIO).to(memory_format=torch.channels_last)
    network = SparseNetwork(model, image_shape=(1, 32, 32))

    config = Config(sparsity=SparsityConfig(keep_ratio=KEEP_RATIO))
    search = Search(
        network,
        Budget(network),  # the masks keep at most KEEP_RATIO of the channels on average
        weight_optimizer=torch.optim.SGD(network.weight_parameters(), lr=0.1, momentum=0.9),
        score_optimizer=torch.optim.Adam([network.scores], lr=0.02),
        generator=torch.Generator().manual_seed(0),
        estimator=make_estimator(network, config),
    )
    search.masks = draw_masks(search, config)  # of the first step; each step draws those of the next one

    data = load_data(config, torch.device("cpu"))
    now = StepSettings(weight_lr=0.1, score_lr=0.02, keep_ratio=KEEP_RATIO)
    batches = data.train.train_batches(BATCH_SIZE, seed=0, epoch=0)
    for step, (images, labels) in zip(range(1, STEPS + 1), batches, strict=False):
        result = train_step(search, images, labels, now, config)
        if step % 20 == 0:
            plan = search.masks.plans(network)[0]
            loss, flops = result.metrics["loss"] / len(labels), network.subnet_macs(plan) / network.dense_macs
            kept = f"{plan.mask_U.sum()} of {network.num_units} channels and {100 * flops:.1f} % of the FLOPs"
            print(f"step {step}: loss {loss:.3f}, the next mask keeps {kept}")


if __name__ == "__main__":
    main()
