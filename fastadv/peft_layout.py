"""A LoRA-tuned classifier as the `peft` library reads it: the same logits from timm's model and an adapter beside it.

peft updates a whole linear layer, and this package only two thirds of the joint one, queries and values: one update of
twice the rank says the same. peft itself is not needed to write the files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastadv.errors import SettingsError
from fastadv.models import Classifier
from fastadv.tuning.lora import Lora, LoraAttention, LoraConv

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE, README = "base_model.safetensors", "README.md"
# What peft puts before the names of the model it wraps.
_PREFIX = "base_model.model."
_README = """# {name} with LoRA, for peft

`adapter_model.safetensors` and `adapter_config.json` are the adapter and the head, `base_model.safetensors` the weights
they were added to.

```python
import timm, torch
from peft import PeftModel
from safetensors.torch import load_file

backbone = {backbone}
backbone.load_state_dict(load_file("base_model.safetensors"), strict=False)  # the head comes with the adapter
model = PeftModel.from_pretrained(backbone, ".").eval()

mean, std = torch.tensor({mean}).view(3, 1, 1), torch.tensor({std}).view(3, 1, 1)
logits = model((x - mean) / std)  # x: (B, 3, {side}, {side}) in [0, 1]
```
"""


def save(model: Classifier, folder: Path, backbone: str) -> None:
    """Write the adapter of ``model``, head included, into ``folder``, and beside it the weights it was added to.

    ``adapter_model.safetensors`` and ``adapter_config.json`` are what ``PeftModel.from_pretrained(model, folder)``
    loads onto timm's model with as many classes; ``base_model.safetensors`` is that model's state without its head.
    backbone: the Python expression that builds timm's model; README.md shows it, and how pixels are to be normalised.
    Raises SettingsError as :func:`adapter` does, before anything is written.
    """
    weights, config = adapter(model)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / WEIGHTS)
    save_file(base(model), folder / BASE)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    mean, std = (tuple(round(value, 6) for value in part.flatten().tolist()) for part in (model.mean, model.std))
    texts = {"name": model.name, "backbone": backbone, "mean": mean, "std": std, "side": model.input_size}
    (folder / README).write_text(_README.format(**texts))


def adapter(model: Classifier) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `peft` loads: tensors by their names there, the head's among them, and its settings.

    A linear layer d -> 3d gets A (2r, d) and B (3d, 2r), a convolution A (r, C, k, k) and B (out, r, 1, 1).
    Raises SettingsError for a model without LoRA, and for what one of peft's settings cannot say.
    """
    layers = _layers(model)
    if not layers:
        raise SettingsError(f"{model.name} has no LoRA layers", "a run whose strategy ends in -lora")
    weights, ranks, alphas = {}, set(), set()
    for name, layer in layers.items():
        if isinstance(layer, LoraConv) and any(step != 1 for step in layer.base.dilation):
            raise SettingsError(f"{name} is a dilated convolution, which peft takes for a plain one", "a plain ResNet")
        a, b = _joint(layer) if isinstance(layer, LoraAttention) else (layer.lora_a, layer.lora_b)
        weights[f"{_PREFIX}{name}.lora_A.weight"], weights[f"{_PREFIX}{name}.lora_B.weight"] = a, b
        ranks.add(len(a))
        # peft multiplies by alpha / r.
        alphas.add(layer.scale * len(a))
    if len(ranks) > 1 or len(alphas) > 1:
        raise SettingsError(f"LoRA layers have ranks {ranks} and alphas {alphas}", "one rank and alpha for all of them")
    head = _head_name(model)
    weights |= {f"{_PREFIX}{head}.{name}": value for name, value in model.head.state_dict().items()}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": model.name,
        "r": ranks.pop(),
        "lora_alpha": alphas.pop(),
        "lora_dropout": next(iter(layers.values())).dropout.p,
        "target_modules": list(layers),
        "modules_to_save": [head],
        "bias": "none",
        "inference_mode": True,
        "task_type": None,
    }
    return {name: value.detach().contiguous() for name, value in weights.items()}, config


def base(model: Classifier) -> dict[str, Tensor]:
    """The state of ``model``'s backbone under timm's names, without updates and without the head."""
    state = dict(model.backbone.state_dict())
    for name, layer in _layers(model).items():
        state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
        state |= {f"{name}.{key}": value for key, value in layer.base.state_dict().items()}
    return {name: value.contiguous() for name, value in state.items()}


def _layers(model: Classifier) -> dict[str, LoraAttention | LoraConv]:
    return {name: module for name, module in model.backbone.named_modules() if isinstance(module, Lora)}


def _joint(layer: LoraAttention) -> tuple[Tensor, Tensor]:
    """A (2r, d) and B (3d, 2r) of the one update that is that of queries above and that of values below."""
    above, below = layer.lora_b_q, layer.lora_b_v
    b = above.new_zeros(3 * len(above), 2 * above.shape[1])
    b[: len(above), : above.shape[1]], b[-len(below) :, above.shape[1] :] = above.detach(), below.detach()
    return torch.cat([layer.lora_a_q, layer.lora_a_v]), b


def _head_name(model: Classifier) -> str:
    """What timm calls the last layer of this backbone when it has classes."""
    backbone: Any = model.backbone
    empty: nn.Module = backbone.get_classifier()
    names: list[str] = [name for name, module in model.backbone.named_modules() if module is empty]
    return names[0]
