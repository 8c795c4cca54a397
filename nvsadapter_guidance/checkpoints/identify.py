"""Which model a file or folder holds, or what is wrong with it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional

from nvsadapter_guidance.adapter import CONFIG_NAME as ADAPTER_CONFIG_NAME
from nvsadapter_guidance.adapter import WEIGHTS_NAME as ADAPTER_WEIGHTS_NAME
from nvsadapter_guidance.checkpoints.adapter_folder import adapter_config, adapter_folder, adapter_part
from nvsadapter_guidance.checkpoints.families import FAMILIES, family_of_width, full_size_config
from nvsadapter_guidance.checkpoints.image_encoder import ImageEncoder, is_image_encoder
from nvsadapter_guidance.checkpoints.parts import ADAPTER, IMAGE, MODEL, UNET, VAE, Blueprint, Part, check
from nvsadapter_guidance.checkpoints.reading import TensorFile
from nvsadapter_guidance.checkpoints.released import has_average, is_released, released_part
from nvsadapter_guidance.checkpoints.released_config import config_beside, released_config
from nvsadapter_guidance.checkpoints.slots import Slot, Slots
from nvsadapter_guidance.checkpoints.stable_diffusion import StableDiffusion, component, is_diffusers_folder, is_ldm
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.model import CONFIG_NAME, WEIGHTS_NAME, NVSModel
from nvsadapter_guidance.saved_pipeline import MODEL_INDEX, holds_pipeline, saved_config

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


@dataclass
class CheckpointReport:
    """What `identify` found; every tensor of it was looked at."""

    kind: str
    """"released", "ldm", "diffusers", "adapter", "model", "pipeline" or "image-encoder"."""
    title: str
    """One line for people."""
    tensors: int
    parameters: int
    bytes: int
    """Of the files with weights."""
    details: Dict[str, str] = field(default_factory=dict)


def identify(path: Path, progress: Optional[Progress] = None) -> CheckpointReport:
    """Say which model a file or folder holds, after reading all of it.

    Names and shapes are compared with those of the model, values must be finite, and the check sums that files of
    ``torch.save`` carry must be right.

    Raises:
        InputError: it holds no model that is known, or is damaged, half downloaded or malicious; one line names the
            file and what is wrong with it.
    """
    if not path.exists():
        raise InputError(f"{path}: does not exist; give a checkpoint file or a model folder")
    if path.is_dir():
        return _identify_folder(path, progress)
    if path.name == ADAPTER_WEIGHTS_NAME and (path.parent / ADAPTER_CONFIG_NAME).is_file():
        return _adapter(path.parent, progress)
    if path.name == WEIGHTS_NAME and _is_model(path.parent):
        return _model(path.parent)
    file = TensorFile(path)
    if is_released(file):
        return _released(path, file, progress)
    if is_ldm(file):
        return _stable_diffusion(path, progress)
    if is_image_encoder(file):
        return _image_encoder(path, progress)
    if path.name == ADAPTER_WEIGHTS_NAME:
        raise InputError(f"{path}: has no {ADAPTER_CONFIG_NAME} beside it; copy the adapter's whole folder")
    raise InputError(f"{path}: holds {len(file)} tensors of no model that is known (first: {next(iter(file), '')!r})")


def _identify_folder(path: Path, progress: Optional[Progress]) -> CheckpointReport:
    if holds_pipeline(path):
        return _pipeline(path, progress)
    if (folder := adapter_folder(path)) is not None:
        return _adapter(folder, progress)
    if _is_model(path):
        return _model(path)
    if is_diffusers_folder(path):
        return _stable_diffusion(path, progress)
    if (path / CONFIG_NAME).is_file() or any(path.glob("open_clip*")):
        return _image_encoder(path, progress)
    raise InputError(f"{path}: holds no model; give a folder of an adapter, of diffusers, or a checkpoint file")


def _model(folder: Path) -> CheckpointReport:
    model = NVSModel.load(folder)
    parameters = sum(value.numel() for value in model.state_dict().values())
    size = (folder / WEIGHTS_NAME).stat().st_size
    title = f"{model.config.name}, a whole model in this project's layout"
    return CheckpointReport("model", title, len(model.state_dict()), parameters, size, _model_details(model))


def _pipeline(folder: Path, progress: Optional[Progress]) -> CheckpointReport:
    config = saved_config(folder)
    blueprint = Blueprint(config, str(folder / MODEL_INDEX))
    model, own = blueprint.model, f"{MODEL}text_context"
    adapter = {ADAPTER + name: Slot(f"adapter.{name}") for name in model.network.adapter.state_dict()}
    slots: Dict[str, Slots] = {"adapter": {**adapter, own: Slot("text_context")}}
    for name, prefix, module in (
        ("unet", UNET, model.network.unet), ("vae", VAE, model.vae), ("image_encoder", IMAGE, model.image_encoder),
    ):  # fmt: skip
        slots[name] = {prefix + key: Slot(key) for key in module.state_dict()}
    files = {name: component(folder / name) for name in slots}
    parts = [Part(file, slots[name], str(file.path)) for name, file in files.items()]
    title = f"{config.name}, a saved NVSAdapterPipeline"
    return _look("pipeline", title, blueprint, parts, files.values(), _model_details(model), progress)


def _model_details(model: NVSModel) -> Dict[str, str]:
    return {"images": f"{model.config.image_size} px", "views together": str(model.num_query)}


def _released(path: Path, file: TensorFile, progress: Optional[Progress]) -> CheckpointReport:
    yaml_path = config_beside(path)
    config = released_config(file, str(path), yaml_path)
    blueprint = Blueprint(config, str(yaml_path or path))
    parts = [released_part(file, blueprint, str(path), use_ema=False)]
    if has_average(file):
        parts.append(released_part(file, blueprint, str(path), use_ema=True))
    family = family_of_width(config.unet["cross_attention_dim"])
    on = FAMILIES[family].title if family else "a base model of other size"
    details = {
        "adapter": f"{config.adapter['num_query']} query views, {config.adapter['view_attn_mode']}",
        "moving average": "yes" if has_average(file) else "no",
        "configuration": str(yaml_path) if yaml_path else "none beside it; read off the tensors",
    }
    title = f"NVS-Adapter on {on}, the whole released model"
    return _look("released", title, blueprint, parts, [file], details, progress)


def _stable_diffusion(path: Path, progress: Optional[Progress]) -> CheckpointReport:
    base = StableDiffusion(path)
    family = family_of_width(base.context_width)
    if family is None:
        raise InputError(f"{path}: has text tokens of {base.context_width} channels; use SD 1.5 or SD 2.1 base")
    config = full_size_config(family)
    config.text_encoder = base.text_options()
    blueprint = Blueprint(config, str(path))
    kind = "diffusers" if base.folder else "ldm"
    title = f"{FAMILIES[family].title}, {'diffusers' if base.folder else 'LDM'} layout"
    return _look(kind, title, blueprint, base.parts(blueprint), base.files, {"family": family}, progress)


def _adapter(folder: Path, progress: Optional[Progress]) -> CheckpointReport:
    config = adapter_config(folder)
    blueprint = Blueprint(config, str(folder))
    part = adapter_part(folder, blueprint)
    adapter = config.adapter
    details = {
        "base model": family_of_width(config.unet["cross_attention_dim"]) or "of other size",
        "adapter": f"{adapter['num_query']} query views, {adapter['view_attn_mode']}, {adapter['query_composer_mode']}",
    }
    files = [part.tensors] if isinstance(part.tensors, TensorFile) else []
    title = "NVS-Adapter alone; needs its base model and image encoder"
    return _look("adapter", title, blueprint, [part], files, details, progress)


def _image_encoder(path: Path, progress: Optional[Progress]) -> CheckpointReport:
    tower = ImageEncoder(path)
    config = full_size_config("sd21")
    config.image_encoder, config.text_encoder = tower.options(), {}
    blueprint = Blueprint(config, str(path))
    size = config.image_encoder
    title = f"CLIP image encoder, {size['num_hidden_layers']} layers of {size['hidden_size']} channels"
    details = {"layout": "OpenCLIP" if tower.openclip else "transformers"}
    return _look("image-encoder", title, blueprint, [tower.part(blueprint)], [tower.file], details, progress)


def _look(
    kind: str,
    title: str,
    blueprint: Blueprint,
    parts: List[Part],
    files: Iterable[TensorFile],
    details: Dict[str, str],
    progress: Optional[Progress],
) -> CheckpointReport:
    files = list(files)
    count = _Counter(progress, 2 * sum(file.bytes for file in files))
    check(parts, blueprint, count)
    for file in files:
        file.check_sums(count)
    count.finish()
    wanted = blueprint.state_dict()
    names = {name for part in parts for name in part.slots}
    parameters = sum(wanted[name].numel() for name in names)
    return CheckpointReport(kind, title, sum(map(len, files)), parameters, sum(file.bytes for file in files), details)


class _Counter:
    """Adds up bytes for a progress bar."""

    def __init__(self, progress: Optional[Progress], total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, count: int) -> None:
        self.done = min(self.done + count, self.total)
        if self.progress is not None:
            self.progress(self.done, self.total)

    def finish(self) -> None:
        self(self.total)


def _is_model(folder: Path) -> bool:
    """Whether a folder has our layout of a whole model; folders of `transformers` have files of the same names."""
    config = folder / CONFIG_NAME
    if not (config.is_file() and (folder / WEIGHTS_NAME).is_file()):
        return False
    return '"model_type"' not in config.read_text(encoding="utf-8", errors="replace")
