"""The model card of an exported network: what is known about it, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trainers.devices import thread_words

CHOICE = {
    "vrpge": "VR-PGE learnt a score for every channel while it trained the weights, and drew masks from the scores.",
    "coin": "The scores of the channels were trained with losses dealt out by a coin, as a control.",
    "gumbel": "Soft gates learnt a score for every channel while the weights were trained.",
    "dense": "Every channel is kept.",
    "thin": "Every layer keeps its first channels, in equal proportion; nothing was searched.",
    "random": "The kept channels were drawn at random.",
    "l1": "The filters of smallest L1 norm were pruned {when}.",
    "slimming": "The channels of smallest batch-norm scale, which training had penalised, were pruned {when}.",
    "taylor_cut": "The channels that change the loss least, to first order, were pruned {when}.",
    "sfp": "The filters of smallest L2 norm were set to zero after every epoch, and pruned in the end.",
}

FOUND = "The kept channels are those of the result of another run; the weights were drawn anew and trained."


def card(facts: Mapping[str, Any], weights: str) -> str:
    """The text of MODEL_CARD.md.

    Args:
        facts: the content of model.json.
        weights: name of the file of the weights.
    """
    images, recipe, result, costs = (facts[key] for key in ("images", "recipe", "result", "costs"))
    classes = images["class_names"]
    shown = ", ".join(classes[:20]) + (f" and {len(classes) - 20} more" if len(classes) > 20 else "")
    test, heldout = result["test"], result["heldout"]
    tested = _count(result["test_images"], "test images")
    judged = _count(result["heldout_images"], "held-out training images")
    chosen = f"{heldout['top1']:.2f} % of {judged}" if heldout else "there were no held-out images"
    size = images["image_size"]
    arch = facts["arch"] + (f" (widths times {facts['width_mult']:g})" if facts["width_mult"] != 1 else "")
    title = f"{facts['arch']} for {facts['set']}"
    ratio = costs["exported"]["multiply_adds"] / costs["dense"]["multiply_adds"]
    versions = facts["versions"]
    return f"""\
---
library_name: pytorch
pipeline_tag: image-classification
tags:
- image-classification
- pruning
- vr-pge
model-index:
- name: {json.dumps(title)}
  results:
  - task:
      type: image-classification
    dataset:
      name: {json.dumps(facts["set"])}
      type: {json.dumps(facts["set"])}
    metrics:
    - type: accuracy
      value: {test["top1"]:.2f}
      name: test top-1 %
---

# {title}

An ordinary PyTorch network of the channels that a training run kept: {100 * ratio:.1f} % of the multiply-adds of the
full {arch}.

## What it does

It tells {len(classes)} classes apart: {shown}.

{_preparation(images)}

## Results

- Test accuracy: {test["top1"]:.2f} % top-1, {test["top5"]:.2f} % top-5, on {tested}, which chose nothing.
- Held-out accuracy: {chosen}. {_choice(facts)}

## Training

- Data: {facts["set"]} (fingerprint {recipe["fingerprint"]}).
- Method: `{recipe["method"]}`, keep ratio {recipe["keep_ratio"]:g} of the {recipe["budget"]}.
  {_how_chosen(recipe)}
- Length: {recipe["epochs"]} epochs in all; the weights are those after epoch {result["epoch"]} ({result["phase"]}).
- Seed {recipe["seed"]}, precision {recipe["precision"]}. One run: nothing is known about the spread between seeds.

## Costs

{_costs(costs)}

Multiply-adds are those of one image. Latencies are medians in milliseconds, with quartiles, of float32 on
{versions["cpu"]} ({versions["cpu_capability"]}), {thread_words(versions["num_threads"])}, torch {versions["torch"]}.
*masked* is the full network, multiplied by masks.

## How to load it

`model.py` and `{weights}` are enough{_needs(weights)}:

```python
from model import load

network = load()
probabilities = network(images).softmax(1)  # images: (B, {images["channels"]}, {size}, {size}), prepared as above
```

## Limits

It was trained for the images described above. How it does on others was not measured. Nobody has examined it for
bias, robustness or safety. This card does not grant a licence; the licence of the images may restrict the use.
"""


def _preparation(images: Mapping[str, Any]) -> str:
    kind = "grey" if images["channels"] == 1 else "RGB"
    size, padding = images["image_size"], images["padding"]
    inner = size - 2 * padding
    border = f" {padding} zeros are put on every side." if padding else ""
    mean, std = (", ".join(f"{value:.4g}" for value in images[key]) for key in ("mean", "std"))
    return (
        f"An image is read as {kind}. Its shorter side is resized to {images['resized_to']} pixels (bilinear, "
        f"antialiased), and its centre of {inner}x{inner} pixels is cut out.{border} A pixel then becomes "
        f"(value / 255 - mean) / std, with mean {mean} and std {std}."
    )


def _choice(facts: Mapping[str, Any]) -> str:
    if not facts["result"]["heldout"]:
        return "The weights are those of the last epoch."
    subnet = facts["recipe"]["subnet_chosen_by"]
    if subnet == "held-out":
        return "They chose the subnet and the epoch."
    return "They chose the epoch; training images chose the subnet."


def _count(number: int | None, what: str) -> str:
    return what if number is None else f"{number:,} {what}"


def _needs(weights: str) -> str:
    return ", with torch and safetensors" if weights.endswith(".safetensors") else ", with torch"


def _costs(costs: Mapping[str, Any]) -> str:
    batches = list(costs["dense"]["latency"])
    lines = [
        ["network", "parameters", "weights", "multiply-adds", *(f"batch {batch}" for batch in batches)],
        ["-"] * (4 + len(batches)),
    ]
    for name, row in costs.items():
        times = [
            "{:.2f} ({:.2f}-{:.2f})".format(row["latency"][b]["median_ms"], *row["latency"][b]["quartiles_ms"])
            for b in batches
        ]
        sizes = [f"{row['parameters']:,}", f"{row['bytes'] / 1e6:.2f} MB", f"{row['multiply_adds'] / 1e6:.2f} M"]
        lines.append([name, *sizes, *times])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _how_chosen(recipe: Mapping[str, Any]) -> str:
    """How the kept channels were chosen."""
    if recipe["widths_of"] is not None:
        return FOUND
    when = "after every epoch while the budget fell" if recipe["budget_falls"] else "after dense training"
    return CHOICE[recipe["method"]].format(when=when)
