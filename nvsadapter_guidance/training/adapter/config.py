"""Options of a training run; the defaults are those of the released base model.

They are written in YAML under the same names (configs/adapter/); `config_files` reads them.
"""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

from nvsadapter_guidance.adapter_config import NVSAdapterConfig
from nvsadapter_guidance.errors import InputError

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
LARGEST_SEED = 2**31 - 1


@dataclass
class ModelOptions:
    """What is trained, and on top of what."""

    base: str = "sd21"
    """"sd21", "sd15", "mini", or a folder in our model layout (`config.json`, `model.safetensors`)."""
    base_weights: Optional[str] = None
    """File, diffusers folder or hub id of the Stable Diffusion below; None: where `checkpoints.sources` finds it."""
    image_encoder: Optional[str] = None
    """The same of OpenCLIP ViT-H/14."""
    random_weights: bool = False
    """Draw the base's weights instead of loading them: for tests and for measurements of speed."""
    adapter: Dict[str, Any] = field(default_factory=dict)
    """Fields of `NVSAdapterConfig` that differ from the base's; the fields not named stay as they are there."""
    adapter_from: Optional[str] = None
    """Folder of a saved adapter to start from; None: fresh layers."""
    full_finetune: bool = False
    """Train the base UNet too, at `optim.base_lr_factor` of the learning rate."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""
    controlnet: bool = False
    """A frozen ControlNet takes part; batches then need control images of every view."""
    controlnet_weights: Optional[str] = None
    """Its weights: an LDM file such as `control_sd15_depth.pth`, or a diffusers folder."""


@dataclass
class DataOptions:
    """Objects, views, and how they are read."""

    kind: str = "folder"
    """Name in `data.DATASETS`: "folder" and "shards" (Zero-1-to-3 renderings), or "synthetic"."""
    root: Optional[str] = None
    """Folder of the objects or shards; of a folder of objects the last hundredth by name is validated on."""
    batch_size: int = 32
    """Objects per device and step; each has one support view and `adapter.num_query` query views."""
    num_workers: int = 8
    """Processes per device that read views."""
    objects: int = 64
    """Of kind "synthetic": how many."""


@dataclass
class OptimOptions:
    """How weights are updated."""

    lr: float = 5e-5
    betas: List[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 10_000
    warmup_start: float = 1e-6
    """Factor on the learning rate at step 0; it grows linearly to 1."""
    base_lr_factor: float = 0.1
    """Factor on the learning rate of the base UNet in full fine-tuning."""
    gradient_clip_norm: float = 0.5
    """Largest norm of all gradients together; 0 switches clipping off."""
    condition_dropout: float = 0.1
    """Share of samples that are trained unconditionally."""
    ema_decay: float = 0.9995


@dataclass
class TrainerOptions:
    """Where, how long and how exactly it is computed, and what is written when."""

    accelerator: str = "auto"
    """"auto" (a GPU where there is one), "gpu" or "cpu"."""
    devices: str = "auto"
    """As Lightning has it: "2" is two devices, "0," the first one, "0,3" these two, "auto" all (on a CPU: one)."""
    num_nodes: int = 1
    precision: str = "16-mixed"
    max_steps: int = 200_000
    accumulate_grad_batches: int = 1
    log_every_steps: int = 50
    checkpoint_every_steps: int = 10_000
    checkpoint_keep: int = -1
    """How many checkpoints are kept, the newest ones; -1: all."""
    val_every_steps: int = 5_000
    """Steps between validations; 0: none."""
    val_batches: int = 16
    images_every_steps: int = 5_000
    """Steps between sheets of sampled views; 0: none."""
    images_objects: int = 4
    images_sampling_steps: int = 20
    images_guidance_scale: float = 3.0
    compile: bool = False
    """Compile the network (`torch.compile`)."""


@dataclass
class TrainConfig:
    """A whole run."""

    name: str = "base"
    """Of the run; its folder is `output/name`."""
    output: str = "outputs/adapter"
    seed: int = 0
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    trainer: TrainerOptions = field(default_factory=TrainerOptions)


_POSITIVE = (
    "data.batch_size", "data.objects", "optim.lr", "optim.eps", "trainer.num_nodes", "trainer.max_steps",
    "trainer.accumulate_grad_batches", "trainer.log_every_steps", "trainer.checkpoint_every_steps",
    "trainer.val_batches", "trainer.images_objects", "trainer.images_sampling_steps",
)  # fmt: skip
_NOT_NEGATIVE = (
    "data.num_workers", "optim.weight_decay", "optim.warmup_steps", "optim.base_lr_factor", "optim.gradient_clip_norm",
    "trainer.val_every_steps", "trainer.images_every_steps", "trainer.images_guidance_scale",
)  # fmt: skip
_SHARES = ("optim.condition_dropout", "optim.ema_decay")
_CHOICES = {"trainer.precision": PRECISIONS, "trainer.accelerator": ("auto", "gpu", "cpu")}


def check_config(config: TrainConfig) -> None:
    """Check values that types cannot.

    Raises:
        InputError: names the first bad key, its value and what it may be.
    """
    _check_ranges(config)
    for key, choices in _CHOICES.items():
        if (value := _value(config, key)) not in choices:
            raise InputError(f"{key} '{value}' is unknown; use one of {', '.join(choices)}")
    if len(config.optim.betas) != 2:
        raise InputError(f"optim.betas has {len(config.optim.betas)} numbers; AdamW needs two")
    if not 0 <= config.seed <= LARGEST_SEED:
        raise InputError(f"seed is {config.seed}; use 0 to {LARGEST_SEED}")
    keep = config.trainer.checkpoint_keep
    if keep == 0 or keep < -1:
        raise InputError(f"trainer.checkpoint_keep is {keep}; use 1 or more, or -1 for all")
    if config.model.controlnet_weights is not None and not config.model.controlnet:
        raise InputError("model.controlnet_weights is given, model.controlnet is false; set it to true too")
    if config.name in ("", ".", "..") or "/" in config.name:
        raise InputError(f"name '{config.name}' cannot be a folder's name; use letters, digits, - and _")
    NVSAdapterConfig.from_dict(dict(config.model.adapter), "model.adapter")


def _check_ranges(config: TrainConfig) -> None:
    for key in _POSITIVE:
        if not _value(config, key) > 0:
            raise InputError(f"{key} is {_value(config, key)}; it must be greater than 0")
    for key in _NOT_NEGATIVE:
        if not _value(config, key) >= 0:
            raise InputError(f"{key} is {_value(config, key)}; it must not be negative")
    shares = {key: _value(config, key) for key in _SHARES}
    for key, value in {**shares, **{f"optim.betas[{i}]": beta for i, beta in enumerate(config.optim.betas)}}.items():
        if not 0.0 <= value < 1.0:
            raise InputError(f"{key} is {value}; use 0 or more, and less than 1")
    if not 0.0 < config.optim.warmup_start <= 1.0:
        raise InputError(f"optim.warmup_start is {config.optim.warmup_start}; use more than 0 and at most 1")


def _value(config: TrainConfig, key: str) -> Any:
    group, name = key.split(".")
    return getattr(getattr(config, group), name)
