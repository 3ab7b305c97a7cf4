"""Is the accelerated attack as strong? Robust images counted with it and with the plain fp32 attack, image by image."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from contestants import STEP_SIZE
from subjects import robust_swin
from torch import Tensor

from fastadv import environment, models
from fastadv.data import ImageSet, in_order, load_test
from fastadv.losses import misclassified
from fastadv.measure import wilson
from fastadv.models import Classifier
from fastadv.pgd import PGD
from fastadv.recipe import parse_number
from fastadv.seeds import generator
from fastadv.threat import ThreatModel

BATCH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this comparison."""
    group = parser.add_argument_group("equal robust accuracy (--equal)")
    group.add_argument("--equal", action="store_true", help="count robust images instead of seconds")
    group.add_argument("--data", default="digits", help="a set as fastadv.evaluate takes it; its test images are used")
    group.add_argument("--num", type=int, default=2000, help="images to attack; the others fit the head")
    group.add_argument("--radius", type=parse_number, default=4 / 255, help="eps")
    group.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], help="of the accelerated attack")


def main(args: argparse.Namespace, out: Path) -> int:
    """Count, print, and put the result beside the speeds in ``out``."""
    found = compared(args.data, num=args.num, eps=args.radius, steps=args.steps, precisions=args.precisions)
    print(text(found))
    document = json.loads(out.read_text()) if out.exists() else {"cells": {}}
    document["equal_robustness"] = found
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {out}")
    return 0


def compared(
    data: str, *, num: int, eps: float, steps: int, precisions: Sequence[str], device: str = "cpu"
) -> dict[str, Any]:
    """Plain fp32 PGD against the accelerated one in each precision, from the same noise, on the same images."""
    images, _ = load_test(data, image_size=models.input_size(models.MICRO))
    num = min(num, 2 * len(images) // 3)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    attacked, rest = (part_of(images, rows) for rows in (order[:num].sort().values, order[num:]))
    model = robust_swin_for(rest).to(device)
    threat, attack = ThreatModel("linf", eps), PGD(steps=steps, step_size=min(STEP_SIZE, eps / 4))
    plain = robust_flags(model, attacked, lambda x, y, g: attack(model, x, y, threat, generator=g))
    clean = robust_flags(model, attacked, lambda x, y, g: x)
    rows: dict[str, Any] = {}
    for precision in precisions:
        fast = attack.on(model, precision=precision)
        flags = robust_flags(model, attacked, lambda x, y, g, fast=fast: fast(x, y, threat, g))
        rows[precision] = {
            **counted(flags),
            "difference_points": 100 * (int(flags.sum()) - int(plain.sum())) / num,
            "only_plain_breaks": int((flags & ~plain).sum()),
            "only_accelerated_breaks": int((plain & ~flags).sum()),
            "captured": fast.captured,
        }
    machine = environment.environment()
    # It would name folders of this machine; data, n, steps and radius are said below.
    del machine["command"]
    return {
        "data": Path(data).name,
        "n": num,
        "classes": len(images.classes),
        "model": f"{models.MICRO}, robust weights, a linear head fitted on {len(rest)} other clean images",
        "clean": counted(clean),
        "attack": f"PGD-{steps}, linf {round(255 * eps, 2):g}/255, final iterate, judged in fp32",
        "plain": counted(plain),
        "accelerated": rows,
        "environment": machine,
    }


def part_of(images: ImageSet, rows: Tensor) -> ImageSet:
    """Some images of a set."""
    return ImageSet(images.images[rows], images.labels[rows], images.classes, images.flip)


def counted(flags: Tensor) -> dict[str, Any]:
    """How many are set, as a share with its Wilson interval."""
    hits, n = int(flags.sum()), len(flags)
    return {"hits": hits, "n": n, "share": hits / n, "interval": wilson(hits, n)}


def robust_flags(model: Classifier, images: ImageSet, attack: Any) -> Tensor:
    """Whether the model is right about what the attack makes of each image, in fp32; the noise is a batch's own."""
    flags, device = [], model.mean.device
    for number, (x, y) in enumerate(in_order(images, BATCH, device)):
        adv = attack(x, y, generator(device, 0, number))
        with torch.no_grad():
            flags.append(~misclassified(model(adv), y))
    return torch.cat(flags).cpu()


def robust_swin_for(images: ImageSet) -> Classifier:
    """The shipped small Swin with a head fitted on the features of ``images`` by full-batch AdamW: seconds."""
    torch.manual_seed(0)
    model = robust_swin().eval()
    model.head = torch.nn.Linear(model.head.in_features, len(images.classes))
    with torch.no_grad():
        features = torch.cat([model.backbone((x - model.mean) / model.std) for x, _ in in_order(images, 256, "cpu")])
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-2, weight_decay=1e-1)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(model.head(features), images.labels, label_smoothing=0.1).backward()
        optimizer.step()
    return model


def text(found: dict[str, Any]) -> str:
    """The comparison as lines."""
    lines = [f"{found['attack']}: {found['n']} images of {found['data']}; {found['model']}"]
    for name, row in {"clean": found["clean"], "plain fp32": found["plain"]}.items():
        lines.append(f"  {name:20} {row['hits']} of {row['n']} right")
    for precision, row in found["accelerated"].items():
        lines.append(
            f"  {'accelerated ' + precision:20} {row['hits']} of {row['n']} right: {row['difference_points']:+.2f} "
            f"points; {row['only_plain_breaks']} broken by plain alone, {row['only_accelerated_breaks']} by it alone"
        )
    return "\n".join(lines)
