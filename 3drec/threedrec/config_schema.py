"""The keys, types and defaults of a config file above its components (threestudio's schema, and a few of ours).

A component's own keys stand in the ``Config`` of its class, found by name through ``threedrec.registry``; its field
here is declared with ``component(kind)``. Field metadata that the validation understands (``threedrec.config_build``):

* ``component``: the registry kind; the class is named by the field ``<kind>_type`` beside it;
* ``ge``, ``gt``, ``le``, ``lt``: limits of a number, of each number of a list, and of each value of a schedule;
* ``ignored``: why the key is accepted but does nothing; a value that is not ``harmless`` is warned about.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from threedrec.losses import LossConfig

Precision = Literal["32-true", "16-mixed", "bf16-mixed"]


def component(kind: str) -> Any:
    """Declare the typed config of a registered component."""
    return field(default_factory=dict, metadata={"component": kind})


def ignored(default: Any, why: str, harmless: tuple[Any, ...] = ()) -> Any:
    """Declare a key of the released project that does nothing here; ``harmless`` values pass silently."""
    return field(default=default, metadata={"ignored": why, "harmless": (default, *harmless)})


def limited(default: Any, **limits: float) -> Any:
    """Declare a key whose value has limits: ``ge``, ``gt``, ``le``, ``lt``."""
    return field(default=default, metadata=limits)


@dataclass
class OptimizerArgs:
    """Arguments of the optimiser, as ``torch.optim`` names them."""

    lr: float = limited(0.01, gt=0)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999], metadata={"ge": 0, "lt": 1})
    eps: float = limited(1e-8, gt=0)
    weight_decay: float | None = limited(None, ge=0)
    """None leaves torch's default (0.01 for AdamW, 0 for Adam)."""

    def __post_init__(self) -> None:
        if len(self.betas) != 2:
            raise ValueError(f"betas: expected two numbers, got {self.betas}")


@dataclass
class ParameterGroupConfig:
    """What differs for one part of the system, such as ``geometry.encoding``."""

    lr: float | None = limited(None, gt=0)
    weight_decay: float | None = limited(None, ge=0)


@dataclass
class OptimizerConfig:
    """One optimiser over the field, the material and the background."""

    name: Literal["Adam", "AdamW"] = "AdamW"
    args: OptimizerArgs = field(default_factory=OptimizerArgs)
    params: dict[str, ParameterGroupConfig] | None = None
    """Parameter groups by module path from the system (``geometry``, ``geometry.encoding``, ``background``); None
    trains everything with ``args``. As in threestudio, what no group names is not trained."""


@dataclass
class SchedulerConfig:
    """How the learning rates change."""

    factor: float | list[int | float] = 1.0
    """Factor on every group's rate; a schedule ``[start, v0, v1, end]`` in steps."""
    interpolation: Literal["linear", "exp"] = "linear"


@dataclass
class FreqConfig:
    """How often things happen, in optimisation steps."""

    ref_only_steps: int = limited(0, ge=0)
    """With "alternate": so many first steps look at the reference view only."""
    ref_or_nvsadapter: Literal["accumulate", "alternate"] = "accumulate"
    """Whether each step sums the losses of the reference view and of random views, or takes them in turns."""
    n_ref: int = limited(2, ge=1)
    """With "alternate": every n-th step looks at the reference view."""
    guidance_eval: int = limited(0, ge=0)
    """Every so many steps save one-step previews of what the guidance sees; 0 never."""


@dataclass
class WandbConfig:
    """Weights & Biases, which this project does not log to."""

    enable: bool = ignored(False, "runs log to TensorBoard and CSV")
    project: str = "threestudio"
    name: str | None = None


@dataclass
class LoggersConfig:
    """Loggers beyond the TensorBoard and CSV ones that every run writes."""

    wandb: WandbConfig = field(default_factory=WandbConfig)


_NO_TEXT = "the adapter was trained with the empty prompt, which is the only one here"


@dataclass
class PromptProcessorConfig:
    """Text prompts of other threestudio systems."""

    pretrained_model_name_or_path: str = ignored("", _NO_TEXT)
    prompt: str = ignored("", _NO_TEXT)


@dataclass
class SystemConfig:
    """Everything that is optimised, and by what."""

    geometry_type: str = "implicit-volume"
    geometry: Any = component("geometry")
    material_type: str = "diffuse-with-point-light-material"
    material: Any = component("material")
    background_type: str = "solid-color-background"
    background: Any = component("background")
    renderer_type: str = "nerf-volume-renderer"
    renderer: Any = component("renderer")
    guidance_type: str = "nvsadapter-guidance"
    guidance: Any = component("guidance")
    exporter_type: str = "mesh-exporter"
    exporter: Any = component("exporter")
    prompt_processor_type: str = ignored("", _NO_TEXT, harmless=("dummy-prompt-processor",))
    """The released YAML names a dummy here, and no code of its project reads it."""
    prompt_processor: PromptProcessorConfig = field(default_factory=PromptProcessorConfig)
    freq: FreqConfig = field(default_factory=FreqConfig)
    loggers: LoggersConfig = field(default_factory=LoggersConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig | None = None
    weights: str | None = None
    """A checkpoint whose field, material and background to start from (unlike ``resume``, from step 0)."""
    ref_rays: int = limited(0, ge=0)
    """Pixels of the reference looked at in each step of score distillation, on a grid with a random phase; 0 for
    all of them, as released."""
    ambient_ratio_min: float = limited(0.5, ge=0, le=1)
    """Random views are lit by an ambient share drawn from [this, 1], the rest by the point light."""


@dataclass
class TrainerConfig:
    """The length of the optimisation and its rhythm, with Lightning's names."""

    max_steps: int = limited(8000, ge=1)
    log_every_n_steps: int = limited(50, ge=1)
    val_check_interval: int = limited(200, ge=1)
    """Render the validation views every so many steps."""
    num_sanity_val_steps: int = limited(0, ge=0)
    """Validation views to render before the first step."""
    enable_progress_bar: bool = True
    precision: Precision = "32-true"
    """Kept for the released YAML: the field computes in float32, and half precision is the guidance's own choice."""
    gradient_clip_val: float | None = limited(None, gt=0)
    """Largest norm of all gradients together; None does not clip."""


@dataclass
class CheckpointConfig:
    """Which checkpoints stay, with the names of Lightning's ModelCheckpoint."""

    save_last: bool = True
    """Keep ``ckpts/last.ckpt`` up to date."""
    save_top_k: int = limited(-1, ge=-1)
    """How many numbered checkpoints to keep beside the last: -1 all, 0 none."""
    every_n_train_steps: int = limited(200, ge=1)


@dataclass
class ExperimentConfig:
    """One config file, resolved."""

    name: str = "default"
    description: str = ignored("", "it is for readers of the file")
    tag: str = "run"
    seed: int = limited(0, ge=0)
    exp_root_dir: str = "./outputs"
    use_timestamp: bool = True
    timestamp: str | None = None
    """``@YYYYmmdd-HHMMSS``; set when the run starts, and kept when it is resumed."""
    trial_dir: str | None = None
    """The run's folder; None makes ``<exp_root_dir>/<name>/<tag><timestamp>``."""
    resume: str | None = None
    """A checkpoint to continue from, or "auto": the newest run of this name and tag that has one."""
    recipe: str = "none"
    """A file of ``configs/recipes`` to lay over this config: its name, "auto" to choose it by the model and the
    device, or "none". The resolved config holds the name of the one that was laid."""
    resolved: bool = False
    """True in a run's ``configs/parsed.yaml``: the recipe's values are in the file already and are not laid again."""

    data_type: str = "single-image-datamodule"
    data: Any = component("data")
    system_type: str = "nvsadapter-system"
    system: SystemConfig = field(default_factory=SystemConfig, metadata={"component": "system"})
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
