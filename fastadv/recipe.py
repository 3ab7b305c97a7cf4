"""Every setting of a run, as one frozen value that is printed, saved and hashed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from tyro.constructors import PrimitiveConstructorSpec

from fastadv.errors import CheckpointError, SettingsError
from fastadv.losses import training_loss
from fastadv.pgd import PGD
from fastadv.registry import did_you_mean
from fastadv.threat import ThreatModel


def parse_number(text: str) -> float:
    """The float that ``text`` says: ``0.03`` or, as the field writes it, ``8/255``. Raises ValueError."""
    top, slash, bottom = text.partition("/")
    if slash and float(bottom) == 0:
        raise ValueError(f"{text} divides by zero")
    return float(top) / float(bottom) if slash else float(text)


def show_pixels(value: float, norm: str = "linf") -> str:
    """A pixel quantity as the field writes it: ``8/255`` for a multiple of 1/255 in linf, else the number."""
    level = round(value * 255, 6)
    return f"{level:g}/255" if norm == "linf" and level == round(level) and level else f"{value:g}"


Pixels = Annotated[
    float,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT|N/255",
        instance_from_str=lambda args: parse_number(args[0]),
        is_instance=lambda value: isinstance(value, float | int),
        str_from_instance=lambda value: [show_pixels(value)],
    ),
]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of a run. The defaults are the paper's attack (arXiv:2312.05716) on the shipped small Swin."""

    strategy: str = "roli-full"
    """Name of the strategy."""
    data: str = "digits"
    """digits, cifar10[:FOLDER], cifar100[:FOLDER], cub, dogs or caltech256 with [:FOLDER[:SPLITS]] (SPLITS holds
    train.json, val.json and test.json), an ImageFolder tree, an .npz file, or a folder of .npz splits."""
    image_size: int | None = None
    """Side in pixels to which images are brought before the attack sees them; by default the model's."""
    per_class: int | None = None
    """Keep at most this many training images of each class."""
    val_images: int | None = None
    """Size of the validation split, taken from train by the seed where the data has none (default: 10 %)."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """What to do with an image file that cannot be decoded: stop and name it, or skip and count it."""
    augment: bool = True
    """Random crop after padding, and mirror where the data allows it."""

    model: str = "swin_micro_64"
    """swin_micro_64, resnet_micro_64, or any Swin, ViT or ResNet of timm."""
    weights: str = "robust"
    """Backbone weights: robust, standard, contrastive or adversarial-contrastive (shipped for small models), none, or a
    .safetensors or .pth file."""
    resize: bool = False
    """Resize inside the model: the attack then sees the data's own size (the paper attacks CIFAR at 32x32)."""
    drop_path: float = 0.0
    """Stochastic depth of the backbone while everything learns."""
    prompt_tokens: int = 10
    """Tokens that prompt tuning adds to every block."""

    norm: Literal["linf", "l2"] = "linf"
    """Norm of the threat."""
    eps: Pixels = 8 / 255
    """Radius of the threat, in pixel units [0, 1]."""
    train_steps: int = 7
    """PGD steps of the attack in training; 1 is the single-step attack with random start."""
    step_size: Pixels = 2 / 255
    """Step of the attack in training, in pixel units."""
    eval_steps: int = 10
    """PGD steps of the attack in validation and evaluation."""
    eval_step_size: Pixels = 2 / 255
    """Step of the attack in validation and evaluation, in pixel units."""

    probe_epochs: int = 20
    """Epochs of the linear probe: roli's first stage, linear's only one."""
    probe_lr: float = 0.03
    """Peak learning rate of the linear probe."""
    probe_weight_decay: float = 0.0
    """Weight decay of the linear probe."""
    probe_optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimiser of the linear probe; sgd has momentum 0.9."""
    epochs: int = 20
    """Epochs of fine-tuning."""
    lr: float = 5e-4
    """Peak learning rate of fine-tuning."""
    weight_decay: float = 0.01
    """Weight decay of fine-tuning, on matrices only; adamw decouples it from the gradient."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimiser of fine-tuning; sgd has momentum 0.9."""
    adam_eps: float = 1e-8
    """What adamw adds to the root of the squared gradients' average."""
    batch_size: int = 64
    """Images per step."""
    schedule: Literal["cosine", "epoch-cosine", "drops"] = "cosine"
    """Learning rate: cosine rises and falls with every step, epoch-cosine with every epoch, the first at zero; drops
    is constant, a tenth after half of the epochs and a hundredth after five sixths."""
    warmup: float = 0.1
    """Share of a stage in which the learning rate rises from zero, for both cosines."""
    clip: float = 1.0
    """Largest gradient norm of one update."""
    label_smoothing: float = 0.0
    """Label smoothing of the training loss."""
    loss: Literal["at", "trades", "mart"] = "at"
    """Training loss: cross-entropy on adversarial images, TRADES or MART; the attack raises cross-entropy in all."""
    beta: float | None = None
    """Weight of the divergence of adversarial from clean answers; by default 6 in trades and autolora, 5 in mart."""

    seed: int = 0
    """Decides the validation split, order, augmentation, noise and the random head."""
    val_every: int = 1
    """Validate every so many epochs, and after a stage's last."""
    checkpoint_minutes: float = 5.0
    """Save inside an epoch when the last checkpoint is older; every epoch's end is saved too."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of training and of its attack: bf16 where the device has it natively. Evaluation is always fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """The attack's passes by torch.compile; auto: on CUDA only, for on a CPU it takes a minute and more."""
    capture: Literal["auto", "on", "off"] = "auto"
    """Attack and update recorded once and replayed, as CUDA graphs; auto: on CUDA only."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        threat = self.threat  # building it checks norm and eps
        for name in ("train_steps", "eval_steps"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        for name in ("step_size", "eval_step_size"):
            value = getattr(self, name)
            _check(name, value, 0 <= value < math.inf, "0 or more, as in 2/255")
            threat.check_step(value)
        _check("checkpoint_minutes", self.checkpoint_minutes, self.checkpoint_minutes >= 0, "0 or more")
        for name in ("probe_epochs", "epochs", "batch_size", "val_every", "prompt_tokens"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in ("image_size", "per_class", "val_images"):
            value = getattr(self, name)
            _check(name, value, value is None or value >= 1, "1 or more")
        for name in ("lr", "probe_lr", "clip", "adam_eps"):
            value = getattr(self, name)
            _check(name, value, value > 0 and math.isfinite(value), "a positive number")
        _check("beta", self.beta, self.beta is None or 0 <= self.beta < math.inf, "0 or more")
        for name in ("weight_decay", "probe_weight_decay"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) < 1, "between 0 and 1")
        for name in ("warmup", "label_smoothing", "drop_path"):
            value = getattr(self, name)
            _check(name, value, 0 <= value < 1, "at least 0 and below 1")
        # Without beta: some strategies have a use of their own for it.
        training_loss(self.loss, label_smoothing=self.label_smoothing)

    @property
    def threat(self) -> ThreatModel:
        """What the attacker may do."""
        return ThreatModel(norm=self.norm, eps=self.eps)

    @property
    def train_attack(self) -> PGD:
        """The attack whose images the model learns from."""
        return PGD(steps=self.train_steps, step_size=self.step_size)

    @property
    def eval_attack(self) -> PGD:
        """The attack of validation and evaluation; stops counting an image as robust at its first wrong iterate."""
        return PGD(steps=self.eval_steps, step_size=self.eval_step_size, keep="success")

    @property
    def sha256(self) -> str:
        """Hash of every setting: equal recipes, equal hashes."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The recipe as JSON, keys in the order of the fields."""
        return json.dumps(dataclasses.asdict(self), indent=2)


def read_settings(path: Path) -> dict[str, Any]:
    """What the recipe saved at ``path`` holds, by field. Raises CheckpointError for a file that is no recipe."""
    try:
        saved = json.loads(path.read_text())
    except ValueError:
        saved = None
    if not isinstance(saved, dict):
        raise CheckpointError(f"{path} is not a recipe (cut off?)", "bring it back as it was, or start a new run")
    return saved


def read_recipe(path: Path, kind: type[Recipe] = Recipe) -> Recipe:
    """The recipe saved at ``path``. Raises SettingsError for a field this version does not know.

    CheckpointError for a file that is no recipe, or has a value of a kind that no run writes.
    """
    saved = read_settings(path)
    known, kinds = {field.name for field in dataclasses.fields(kind)}, get_type_hints(kind)
    for name, value in saved.items():
        if name not in known:
            raise SettingsError(f"{path} has an unknown field {name!r}", did_you_mean(name, known))
        if not _fits(value, kinds[name]):
            raise CheckpointError(
                f"{path} has {json.dumps(value)} for {name}, which no run writes",
                "bring it back as it was, or start a new run",
            )
    return kind(**saved)


def _fits(value: object, hint: Any) -> bool:
    """Whether ``value``, from JSON, is of the kind that the type ``hint`` says; kinds no recipe here has always fit."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint in (int, float):
        # True is an int to Python, and a whole number is a float to whoever edits the file.
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, str, NoneType) else True


def _check(name: str, value: object, good: bool, wanted: str) -> None:
    if not good:
        raise SettingsError(f"{name} is {value}", f"--{name.replace('_', '-')} takes {wanted}")
