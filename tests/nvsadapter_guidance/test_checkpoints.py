"""Tiny files in the real layouts: loaded, compared with the modules they stand for, converted, identified, refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    CONTEXT,
    LDM_UNET,
    LDM_VAE,
    ldm_tensors,
    released_tensors,
    write_released,
    write_settings,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPVisionModelWithProjection

from nvsadapter_guidance.checkpoints import convert_released, families, identify, to_released
from nvsadapter_guidance.checkpoints.adapter_folder import MODEL_CONFIG_NAME
from nvsadapter_guidance.checkpoints.reading import TensorFile
from nvsadapter_guidance.checkpoints.released_config import IMAGE_PREFIX, TEXT_PREFIX
from nvsadapter_guidance.checkpoints.sources import BASE_VARIABLE, IMAGE_ENCODER_VARIABLE
from nvsadapter_guidance.conversion import ema_name
from nvsadapter_guidance.conversion import to_released as network_to_released
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.guidance import ScoreDistillation
from nvsadapter_guidance.model import NVSModel
from nvsadapter_guidance.pipeline import Poses
from nvsadapter_guidance.weights import choose_weights, load_model

UNET = "model.diffusion_model."


@pytest.fixture(autouse=True)
def _nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for variable in ("THREEDREC_CHECKPOINTS", BASE_VARIABLE, IMAGE_ENCODER_VARIABLE):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return released_tensors()


@pytest.fixture(scope="module")
def checkpoint(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_released(tmp_path_factory.mktemp("released"), tensors)


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    convert_released(checkpoint, folder)
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor]) -> dict[str, Path]:
    """The base model and the image encoder in all their layouts."""
    root = tmp_path_factory.mktemp("parts")
    ldm = ldm_tensors()
    save_file({key: value.contiguous() for key, value in ldm.items()}, root / "v2.safetensors")
    torch.save({"state_dict": ldm, "global_step": 1}, root / "v2.ckpt")
    tower = {key.removeprefix(IMAGE_PREFIX): value for key, value in tensors.items() if key.startswith(IMAGE_PREFIX)}
    torch.save(tower, root / "open_clip_pytorch_model.bin")
    return {"ldm.safetensors": root / "v2.safetensors", "ldm.ckpt": root / "v2.ckpt",
            "openclip": root / "open_clip_pytorch_model.bin", "root": root}  # fmt: skip


def write_diffusers(folder: Path, model: NVSModel, old_names: bool = False) -> Path:
    """The base model of `model` as diffusers and transformers save it."""
    model.network.unet.save_pretrained(folder / "unet")
    model.vae.save_pretrained(folder / "vae")
    assert model.prompt_encoder is not None
    model.prompt_encoder.text_model.save_pretrained(folder / "text_encoder")
    model.image_encoder.save_pretrained(folder / "image_encoder")
    if old_names:
        path = folder / "vae" / "diffusion_pytorch_model.safetensors"
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        renamed = {}
        for key, value in load_file(path).items():
            for new, old in names.items():
                key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
            renamed[key] = value
        save_file(renamed, path)
    return folder


def same_weights(first: NVSModel, second: NVSModel) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("use_ema", [True, False])
def test_every_tensor_of_the_network_arrives(checkpoint: Path, tensors: dict[str, Tensor], use_ema: bool) -> None:
    model = load_model(str(checkpoint), use_ema=use_ema)
    for key, value in network_to_released(model.network.unet, model.network.adapter).items():
        average = ema_name(key)
        expected = tensors[average] if use_ema and average in tensors else tensors[UNET + key]
        assert torch.equal(value, expected), key


def test_the_model_follows_the_released_conventions(checkpoint: Path) -> None:
    model = load_model(str(checkpoint))
    assert model.config.image_size == 64 and model.num_query == 2 and model.config.distance == 1.5
    assert model.config.unconditional_support == "noise" and model.config.fov_deg == 49.1
    assert (model.convention.focal, model.convention.axes) == ("released", "released")
    assert load_model(str(checkpoint), pose_convention="released-sampling").convention.axes == "released-sampling"
    assert model.schedule.prediction_type == "epsilon"
    sigma = ((1 - model.schedule.alphas_cumprod) / model.schedule.alphas_cumprod).sqrt()
    assert sigma[0].item() == pytest.approx(0.0292, abs=1e-4) and sigma[-1].item() == pytest.approx(14.6146, abs=1e-4)
    assert model.vae.config.scaling_factor == 0.18215
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


class Attention(nn.Module):
    """OpenCLIP's residual block, on its own names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


def openclip_blocks(tensors: dict[str, Tensor], prefix: str, x: Tensor, layers: int, mask: Tensor | None) -> Tensor:
    for layer in range(layers):
        start = f"{prefix}{layer}."
        block = Attention(x.shape[-1], max(1, x.shape[-1] // 64))
        block.load_state_dict({key.removeprefix(start): v for key, v in tensors.items() if key.startswith(start)})
        x = block.eval()(x, mask)
    return x


@torch.no_grad()
def test_the_text_tower_computes_what_openclip_computes(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Penultimate layer, then the final norm, of the begin and end tokens padded with zeros."""
    prefix = f"{TEXT_PREFIX}model."
    ids = torch.tensor([[98, 99, 0, 0, 0, 0, 0]])
    x = tensors[f"{prefix}token_embedding.weight"][ids] + tensors[f"{prefix}positional_embedding"]
    mask = torch.full((7, 7), float("-inf")).triu(1)
    x = openclip_blocks(tensors, f"{prefix}transformer.resblocks.", x, 2, mask)
    expected = F.layer_norm(x, [CONTEXT], tensors[f"{prefix}ln_final.weight"], tensors[f"{prefix}ln_final.bias"])
    model = load_model(str(checkpoint))
    torch.testing.assert_close(model.text_tokens(), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_image_tower_computes_what_openclip_computes(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    own = {key.removeprefix(f"{IMAGE_PREFIX}visual."): v for key, v in tensors.items() if key.startswith(IMAGE_PREFIX)}
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    resized = F.interpolate(images, (28, 28), mode="bicubic", align_corners=True)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = ((resized + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    x = F.conv2d(pixels, own["conv1.weight"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([own["class_embedding"].expand(2, 1, -1), x], dim=1) + own["positional_embedding"]
    x = F.layer_norm(x, [64], own["ln_pre.weight"], own["ln_pre.bias"])
    x = openclip_blocks(own, "transformer.resblocks.", x, 2, None)
    expected = F.layer_norm(x[:, 0], [64], own["ln_post.weight"], own["ln_post.bias"]) @ own["proj"]
    model = load_model(str(checkpoint))
    torch.testing.assert_close(model.semantic_tokens(images)[:, 0], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["ldm.safetensors", "ldm.ckpt"])
def test_unet_and_autoencoder_equal_diffusers_own_conversion(
    layout: str, parts: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    ours = load_model(str(adapter), base=str(parts[layout]), image_encoder=str(parts["openclip"]))
    (tmp_path / "unet").mkdir()
    unet_config = {"_class_name": "UNet2DConditionModel", **ours.config.unet}
    vae_config = {"_class_name": "AutoencoderKL", **ours.config.vae}
    for name, values in (("unet", unet_config), ("vae", vae_config)):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text(json.dumps(values))
    source = str(parts["ldm.safetensors"])
    unet = UNet2DConditionModel.from_single_file(source, config=str(tmp_path), subfolder="unet")
    vae = AutoencoderKL.from_single_file(source, config=str(tmp_path), subfolder="vae")
    for theirs, mine in ((unet, ours.network.unet), (vae, ours.vae)):
        state = theirs.state_dict()
        assert state.keys() == mine.state_dict().keys()
        assert all(torch.equal(value, state[key]) for key, value in mine.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("old_names", [False, True], ids=["diffusers", "diffusers with old attention names"])
def test_all_layouts_of_the_parts_make_the_same_model(
    checkpoint: Path, parts: dict[str, Path], adapter: Path, tmp_path: Path, old_names: bool
) -> None:
    whole = load_model(str(checkpoint))
    folder = write_diffusers(tmp_path / "sd", whole, old_names)
    for base, tower in (
        (parts["ldm.safetensors"], parts["openclip"]),
        (parts["ldm.ckpt"], checkpoint),
        (folder, folder / "image_encoder"),
    ):
        assert same_weights(load_model(str(adapter), base=str(base), image_encoder=str(tower)), whole), base
    shutil.copytree(adapter, folder / "adapter")
    assert same_weights(load_model(str(folder)), whole)


def test_sd15_text_towers_are_huggingface_ones_with_other_padding(tmp_path: Path) -> None:
    tensors = released_tensors("huggingface")
    path = write_released(tmp_path, tensors)
    model = load_model(str(path))
    assert model.prompt_encoder is not None
    assert model.prompt_encoder.token_ids("").tolist() == [[98, 99, 99, 99, 99, 99, 99]]
    ldm = tmp_path / "v1-5.ckpt"
    torch.save({"state_dict": ldm_tensors("huggingface")}, ldm)
    convert_released(path, tmp_path / "adapter")
    assert same_weights(load_model(str(tmp_path / "adapter"), base=str(ldm), image_encoder=str(path)), model)


def test_prompts_need_a_tokenizer_and_models_without_text_ignore_them(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("THREEDREC_TOKENIZER", str(tmp_path / "none"))
    with pytest.raises(InputError, match="prompt 'a chair': no CLIP tokenizer.*THREEDREC_TOKENIZER"):
        load_model(str(checkpoint)).text_tokens("a chair")
    mini = load_model("mini")
    assert torch.equal(mini.text_tokens("a chair"), mini.text_tokens())
    assert "ignored" in caplog.text


def test_prompts_are_cut_and_padded(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    others = (str(number) for number in range(46))
    words = [*letters, *(f"{letter}</w>" for letter in letters), *others, "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    monkeypatch.setenv("THREEDREC_TOKENIZER", str(tmp_path))
    model = load_model(str(checkpoint))
    assert model.prompt_encoder is not None
    assert model.prompt_encoder.token_ids(" A b ").tolist() == [[98, 26, 27, 99, 0, 0, 0]]
    assert model.prompt_encoder.token_ids("a b c d e f g").tolist() == [[98, 26, 27, 28, 29, 30, 99]]
    assert (model.text_tokens("a b") - model.text_tokens()).abs().max() > 1e-3


def test_half_precision_keeps_autoencoder_and_rays_exact(checkpoint: Path) -> None:
    model = load_model(str(checkpoint), dtype=torch.bfloat16)
    assert model.dtype == model.text_tokens().dtype == torch.bfloat16
    exact = {*model.vae.parameters(), *model.network.adapter.ray_convs.parameters()}
    assert {p.dtype for p in exact} == {torch.float32}
    assert {p.dtype for p in model.parameters() if p not in exact} == {torch.bfloat16}
    assert same_weights(model.to(torch.float32).to(torch.bfloat16), model)


def test_conversion_is_lossless_both_ways(checkpoint: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    sizes = convert_released(checkpoint, tmp_path / "raw", use_ema=False)
    assert {name: (tmp_path / "raw" / name).stat().st_size for name in sizes} == sizes
    assert set(sizes) == {path.name for path in (tmp_path / "raw").iterdir()}
    pure = {key: value for key, value in tensors.items() if not key.startswith("model_ema.")}
    write_released(tmp_path / "pure", pure)
    for suffix in (".safetensors", ".ckpt"):
        back = tmp_path / f"back{suffix}"
        assert to_released(tmp_path / "raw", tmp_path / "pure" / "tiny_step_10.ckpt", back) == back.stat().st_size
        again = load_file(back) if suffix == ".safetensors" else torch.load(back, weights_only=True)["state_dict"]
        assert again.keys() == pure.keys() and all(torch.equal(again[key], pure[key]) for key in pure)


def test_an_average_takes_both_places_when_it_goes_back(adapter: Path, checkpoint: Path, tmp_path: Path) -> None:
    to_released(adapter, checkpoint, tmp_path / "tiny.safetensors")
    write_settings(tmp_path / "tiny.yaml")
    averaged = load_model(str(checkpoint), use_ema=True)
    for use_ema in (False, True):
        assert same_weights(load_model(str(tmp_path / "tiny.safetensors"), use_ema=use_ema), averaged)


def test_a_checkpoint_without_an_average_says_so(
    tensors: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_released(tmp_path, {key: v for key, v in tensors.items() if not key.startswith("model_ema.")})
    model = load_model(str(path))
    assert "no moving average" in caplog.text
    assert same_weights(model, load_model(str(path), use_ema=False))
    with pytest.raises(InputError, match="holds no moving average"):
        convert_released(path, tmp_path / "adapter")


def test_files_are_identified(
    checkpoint: Path, adapter: Path, parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = families.Family("tiny", "Tiny Diffusion", LDM_UNET, (), ())
    monkeypatch.setitem(families.FAMILIES, "tiny", tiny)
    monkeypatch.setattr(families, "LDM_VAE", LDM_VAE)
    folder = write_diffusers(tmp_path / "sd", load_model(str(checkpoint)))
    found = {
        path: identify(path)
        for path in (checkpoint, adapter, parts["ldm.ckpt"], folder, parts["openclip"], folder / "image_encoder")
    }
    kinds = ["released", "adapter", "ldm", "diffusers", "image-encoder", "image-encoder"]
    assert [report.kind for report in found.values()] == kinds
    assert found[checkpoint].details["moving average"] == "yes"
    assert found[parts["ldm.ckpt"]].parameters == found[folder].parameters
    assert "Tiny Diffusion" in found[folder].title
    done: list[tuple[int, int]] = []
    identify(checkpoint, lambda now, total: done.append((now, total)))
    assert done[-1][0] == done[-1][1] and [now for now, _ in done] == sorted(now for now, _ in done)


def test_the_embedded_model_is_identified() -> None:
    report = identify(choose_weights("mini").path)
    assert report.kind == "model" and "3drec-mini" in report.title


def change(tensors: dict[str, Tensor], name: str, value: Tensor | None) -> dict[str, Tensor]:
    changed = {key: tensor for key, tensor in tensors.items() if key != name}
    return changed if value is None else {**changed, name: value}


FIRST = f"{UNET}unet.time_embed.0.weight"
BREAKS: dict[str, tuple[str, Any, str]] = {
    "missing": (FIRST, None, f"'{FIRST}' is missing"),
    "missing average": ("model_ema.diffusion_modelpe_blocks0bias", None, "pe_blocks0bias' is missing"),
    "surplus": ("model.extra", torch.ones(1), "'model.extra' is not known"),
    "shape": (FIRST, torch.ones(3, 3), f"'{FIRST}' has shape"),
    "nan": ("first_stage_model.quant_conv.bias", torch.full((8,), float("nan")), "quant_conv.bias' holds NaN"),
    "another model": (f"{UNET}pe_blocks.0.weight", None, "is no NVS-Adapter"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_wrong_checkpoints_are_refused_in_one_line(case: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    name, value, message = BREAKS[case]
    path = write_released(tmp_path, change(tensors, name, value))
    with pytest.raises(InputError) as loading:
        load_model(str(path))
    with pytest.raises(InputError) as identifying:
        identify(path)
    for caught in (loading, identifying):
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert message in str(loading.value) or case == "another model"


def test_truncated_and_malicious_checkpoints_are_refused_in_one_line(checkpoint: Path, tmp_path: Path) -> None:
    content = checkpoint.read_bytes()
    for share in (0.2, 0.999):
        path = tmp_path / "cut.ckpt"
        path.write_bytes(content[: int(share * len(content))])
        for look in (identify, lambda path: load_model(str(path))):
            with pytest.raises(InputError, match="cut.ckpt.*truncated or damaged.*download it again") as caught:
                look(path)
            assert "\n" not in str(caught.value)


def test_a_base_model_is_no_adapter_and_an_adapter_no_base(parts: dict[str, Path], adapter: Path) -> None:
    with pytest.raises(InputError, match="Stable Diffusion without an adapter"):
        load_model(str(parts["ldm.ckpt"]))
    with pytest.raises(InputError, match="no Stable Diffusion checkpoint"):
        load_model(str(adapter), base=str(parts["openclip"]), image_encoder=str(parts["openclip"]))
    with pytest.raises(InputError, match="no CLIP image encoder"):
        load_model(str(adapter), base=str(parts["ldm.ckpt"]), image_encoder=str(parts["ldm.ckpt"]))
    with pytest.raises(InputError, match="base model: nothing at 'someone/nothing'"):
        load_model(str(adapter), base="someone/nothing")


def test_parts_are_found_where_they_were_downloaded_to(
    checkpoint: Path, adapter: Path, parts: dict[str, Path], tmp_path: Path
) -> None:
    whole = load_model(str(checkpoint))
    repository = tmp_path / "hub" / "models--sd2-community--stable-diffusion-2-1-base"
    write_diffusers(repository / "snapshots" / "0123", whole)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(parts["openclip"], tmp_path / "checkpoints")
    assert same_weights(load_model(str(adapter)), whole)
    shutil.copy(parts["ldm.ckpt"], tmp_path / "checkpoints" / "v2-1_512-ema-pruned.ckpt")
    shutil.rmtree(tmp_path / "hub")
    assert same_weights(load_model(str(adapter)), whole)


def test_missing_parts_are_named_with_what_to_do(adapter: Path, parts: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="base model: .*3drec weights download sd21"):
        load_model(str(adapter))
    with pytest.raises(InputError, match="image encoder: .*3drec weights download clip"):
        load_model(str(adapter), base=str(parts["ldm.ckpt"]))


def test_a_velocity_model_is_refused(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    folder = write_diffusers(tmp_path / "sd", load_model(str(checkpoint)))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    with pytest.raises(InputError, match="768 px"):
        load_model(str(adapter), base=str(folder), image_encoder=str(folder / "image_encoder"))


def test_an_interrupted_conversion_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nvsadapter_guidance.checkpoints.convert.write_model_config", full)
    with pytest.raises(InputError, match="No space left"):
        convert_released(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_settings_beside_an_adapter_are_named(adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(adapter, folder)
    (folder / MODEL_CONFIG_NAME).write_text('{"name": "x"}')
    with pytest.raises(InputError, match=f"{MODEL_CONFIG_NAME}.*'adapter' is missing"):
        load_model(str(folder))


def test_towers_are_transformers_classes(checkpoint: Path) -> None:
    model = load_model(str(checkpoint))
    assert isinstance(model.image_encoder, CLIPVisionModelWithProjection)
    assert model.prompt_encoder is not None and isinstance(model.prompt_encoder.text_model, CLIPTextModel)


def test_half_precision_files_load_in_the_precision_asked_for(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    half = {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
    path = write_released(tmp_path / "half", half)
    rounded = {key: value.float() if value.is_floating_point() else value for key, value in half.items()}
    reference = load_model(str(write_released(tmp_path / "rounded", rounded)))
    assert same_weights(load_model(str(path)), reference)
    model = load_model(str(path), dtype=torch.float16)
    assert model.dtype == torch.float16 and model.vae.dtype == torch.float32
    assert same_weights(model, reference.to(torch.float16))


def test_tensors_are_mapped_from_the_file_and_not_copied(checkpoint: Path, parts: dict[str, Path]) -> None:
    """Asked for twice, a tensor lies at the same address: in the mapping of its file."""
    for path in (checkpoint, parts["ldm.safetensors"]):
        file = TensorFile(path)
        first = next(iter(file))
        assert file[first].data_ptr() == file[first].data_ptr()
        distance = file[first].data_ptr() - file[list(file)[-1]].data_ptr()
        assert 0 < abs(distance) < path.stat().st_size


def test_score_distillation_of_a_loaded_model_agrees_across_precisions(checkpoint: Path) -> None:
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        guidance = ScoreDistillation(load_model(str(checkpoint), dtype=dtype), num_query=2)
        generator = torch.Generator().manual_seed(0)
        pose = Poses(torch.zeros(1), torch.zeros(1), torch.full((1,), 1.5))
        guidance.prepare(torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1, pose, generator)
        views = (torch.rand(4, 3, 64, 64, generator=generator) * 2 - 1).requires_grad_()
        around = Poses(torch.tensor([-60.0, 20.0, 90.0, 180.0]), torch.full((4,), 10.0), torch.full((4,), 1.5))
        guidance(views, around, (0.3, 0.7), generator).loss.backward()
        assert views.grad is not None and bool(views.grad.isfinite().all())
        gradients.append(views.grad.flatten())
    assert F.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.999
