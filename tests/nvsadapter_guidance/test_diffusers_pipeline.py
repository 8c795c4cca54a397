"""The diffusers pipeline: round trips, order of views, determinism, schedulers, precision, mistakes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DEISMultistepScheduler, DiffusionPipeline, UniPCMultistepScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_nvs import tiny_nvs_model

from nvsadapter_guidance.diffusers_pipeline import NVSAdapterPipeline
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.images import support_tensor
from nvsadapter_guidance.model import NVSModel
from nvsadapter_guidance.schedulers import SCHEDULERS, build_scheduler

EIGHT = {"elevations": [0, 10, 0, 20, 0, 10, 0, 20], "azimuths": [0, 45, 90, 135, 180, 225, 270, 315]}


def quiet(pipeline: NVSAdapterPipeline) -> NVSAdapterPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline() -> NVSAdapterPipeline:
    return quiet(NVSAdapterPipeline.from_model(tiny_nvs_model()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pipeline")
    NVSAdapterPipeline.from_model(tiny_nvs_model(unconditional_support="noise")).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 4), dtype=np.uint8)
    return Image.fromarray(pixels)


def views(pipeline: NVSAdapterPipeline, image: Image.Image, seed: int = 0, **options) -> np.ndarray:
    arguments = {**EIGHT, "num_inference_steps": 3, "output_type": "np", **options}
    return pipeline(image, generator=torch.Generator().manual_seed(seed), **arguments).images


def test_saving_and_loading_changes_nothing(folder, image) -> None:
    files = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
    assert files == [
        "adapter/config.json",
        "adapter/diffusion_pytorch_model.safetensors",
        "image_encoder/config.json",
        "image_encoder/model.safetensors",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    # A model that draws noise at every call, so that one draw too many would show.
    original = quiet(NVSAdapterPipeline.from_model(tiny_nvs_model(unconditional_support="noise")))
    loaded = quiet(NVSAdapterPipeline.from_pretrained(folder))
    assert type(loaded) is NVSAdapterPipeline and isinstance(loaded, DiffusionPipeline)
    for name in ("vae", "image_encoder", "unet", "adapter"):
        before, after = (getattr(part, name).state_dict() for part in (original, loaded))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert loaded.scheduler.config["trained_betas"] == original.scheduler.config["trained_betas"]
    assert np.allclose(views(original, image), views(loaded, image), atol=1e-5)


def test_a_model_folder_loads_too(tmp_path, image) -> None:
    tiny_nvs_model().save(tmp_path)
    loaded = quiet(NVSAdapterPipeline.from_pretrained(tmp_path))
    again = quiet(NVSAdapterPipeline.from_model(NVSModel.load(tmp_path)))
    assert np.array_equal(views(loaded, image), views(again, image))


def test_a_name_with_an_owner_is_looked_for_here_before_the_hub(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(NVSAdapterPipeline, "download", None)
    monkeypatch.setenv("THREEDREC_CHECKPOINTS", str(tmp_path))
    tiny_nvs_model().save(tmp_path / "model")
    shutil.copytree(folder, tmp_path / "saved")
    for name in ("model", "saved"):
        assert NVSAdapterPipeline.from_pretrained(f"someone/{name}").config.model_config["name"] == "tiny"


def test_components_are_shared_and_listed(pipeline) -> None:
    assert set(pipeline.components) == {"vae", "image_encoder", "unet", "adapter", "scheduler"}
    copy = NVSAdapterPipeline(**pipeline.components, model_config=pipeline.config.model_config)
    assert copy.unet is pipeline.unet and copy.model.network.adapter is pipeline.adapter.adapter


def test_the_unet_is_saved_without_the_adapter(folder) -> None:
    keys = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").keys()
    assert keys == tiny_nvs_model().network.unet.state_dict().keys()


def test_a_seed_repeats_the_views_and_another_does_not(pipeline, image) -> None:
    assert np.array_equal(views(pipeline, image), views(pipeline, image))
    assert not np.allclose(views(pipeline, image), views(pipeline, image, seed=1), atol=1e-3)


def test_without_a_generator_torchs_seed_decides(pipeline, image) -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(pipeline(image, [0], [30], num_inference_steps=2, output_type="np").images)
    assert np.array_equal(*results)


@pytest.mark.parametrize("count", [1, 3, 5, 8])
@pytest.mark.parametrize("num_query", [1, 2, 4])
def test_views_keep_their_order_in_batches_of_num_query(pipeline, image, count, num_query) -> None:
    latents = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    poses = {key: values[:count] for key, values in EIGHT.items()}
    options = {"num_query": num_query, "output_type": "latent", "num_inference_steps": 2}
    together = views(pipeline, image, latents=latents[:count], **poses, **options)
    assert len(together) == count
    start = count - count % num_query - num_query if count >= num_query else None
    if start is not None:  # the last complete batch, alone
        part = slice(start, start + num_query)
        alone_poses = {key: values[part] for key, values in EIGHT.items()}
        alone = views(pipeline, image, latents=latents[part], **alone_poses, **options)
        assert torch.allclose(together[part], alone, atol=1e-4)


def test_groups_in_one_call_or_in_many_are_the_same(pipeline, image) -> None:
    for rotating in (False, True):
        one, many = (views(pipeline, image, groups_per_call=n, rotating_groups=rotating) for n in (1, 8))
        assert np.allclose(one, many, atol=1e-4)


def test_rotating_groups_let_all_views_depend_on_each_other(pipeline, image) -> None:
    latents = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    changed = latents.clone()
    changed[7] += 1.0
    for rotating, spreads in ((False, False), (True, True)):
        before, after = (views(pipeline, image, latents=x, rotating_groups=rotating) for x in (latents, changed))
        assert np.allclose(before[0], after[0], atol=1e-6) != spreads


def test_schedulers_converge_to_the_same_views(pipeline, image) -> None:
    results = {}
    for name in SCHEDULERS:
        pipeline.scheduler = build_scheduler(name, pipeline.model.schedule)
        results[name] = views(pipeline, image, num_inference_steps=100, output_type="latent")
    scale = results["euler"].std()
    for name, latents in results.items():
        assert (latents - results["euler"]).std() < 0.02 * scale, name


def test_a_scheduler_of_diffusers_takes_over(pipeline, image) -> None:
    euler = views(pipeline, image, num_inference_steps=100)
    pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    assert np.abs(views(pipeline, image, num_inference_steps=30) - euler).mean() < 0.01


def test_output_types_agree(pipeline, image) -> None:
    array = views(pipeline, image)
    tensor = views(pipeline, image, output_type="pt")
    pictures = views(pipeline, image, output_type="pil")
    latents = views(pipeline, image, output_type="latent")
    assert array.shape == (8, 32, 32, 3) and tensor.shape == (8, 3, 32, 32) and latents.shape == (8, 4, 8, 8)
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy()) and 0 <= array.min() <= array.max() <= 1
    assert np.abs(np.stack([np.asarray(p) for p in pictures]) / 255 - array).max() <= 0.5 / 255 + 1e-6
    (plain,) = pipeline(image, **EIGHT, num_inference_steps=1, output_type="np", return_dict=False)
    assert plain.shape == array.shape


def test_the_first_noise_may_be_weaker(pipeline, image) -> None:
    latents = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    weaker = views(pipeline, image, latents=latents, noise_scale=0.3)
    assert np.allclose(weaker, views(pipeline, image, latents=0.3 * latents, noise_scale=1.0), atol=1e-6)
    assert not np.allclose(weaker, views(pipeline, image, latents=latents), atol=1e-3)
    suited = quiet(NVSAdapterPipeline.from_model(tiny_nvs_model(sampling_noise=0.3)))
    assert np.allclose(views(suited, image, latents=latents), weaker, atol=1e-6)
    with pytest.raises(InputError, match="noise_scale is -1; use 0 or more"):
        views(pipeline, image, noise_scale=-1)


def test_the_callback_sees_every_step_and_may_change_the_latents(pipeline, image) -> None:
    seen = []

    def callback(given, index, timestep, tensors):
        assert given is pipeline
        seen.append((index, timestep, tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if index == 2 else {}

    latents = views(pipeline, image, callback_on_step_end=callback, output_type="latent")
    assert seen == [(0, 999, (8, 4, 8, 8)), (1, 666, (8, 4, 8, 8)), (2, 333, (8, 4, 8, 8))]
    assert torch.equal(latents, torch.zeros_like(latents))


@pytest.mark.parametrize(("unconditional", "steps", "scale"), [("zeros", 20, 1.0), ("noise", 50, 3.0)])
def test_steps_and_guidance_suit_the_weights(image, unconditional, steps, scale) -> None:
    pipeline = quiet(NVSAdapterPipeline.from_model(tiny_nvs_model(unconditional_support=unconditional)))
    places = {"elevations": [0], "azimuths": [30], "output_type": "np"}
    found, expected = (
        pipeline(image, generator=torch.Generator().manual_seed(0), **places, **options).images
        for options in ({}, {"num_inference_steps": steps, "guidance_scale": scale})
    )
    assert np.array_equal(found, expected)


def test_what_was_saved_in_half_precision_comes_back_in_one_precision(folder, tmp_path) -> None:
    NVSAdapterPipeline.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    for options, expected in (({}, torch.float32), ({"dtype": torch.bfloat16}, torch.bfloat16)):
        loaded = NVSAdapterPipeline.from_pretrained(tmp_path, **options)
        assert loaded.unet.dtype == loaded.image_encoder.dtype == expected and loaded.vae.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_what_needs_more(pipeline, folder, image, dtype) -> None:
    reference = views(quiet(NVSAdapterPipeline.from_pretrained(folder)), image)
    for half in (
        quiet(NVSAdapterPipeline.from_pretrained(folder, dtype=dtype)),
        quiet(NVSAdapterPipeline.from_pretrained(folder)).to(dtype),
    ):
        assert half.unet.dtype == half.image_encoder.dtype == dtype and half.vae.dtype == torch.float32
        assert all(parameter.dtype == torch.float32 for parameter in half.adapter.adapter.ray_convs.parameters())
        assert np.abs(views(half, image) - reference).mean() < 0.01


def test_transparent_pixels_become_white_and_others_stay() -> None:
    pixels = np.zeros((4, 4, 4), dtype=np.uint8)
    pixels[0, 0] = (10, 20, 30, 0)
    pixels[0, 1] = (10, 20, 30, 1)
    tensor = (support_tensor(Image.fromarray(pixels), 4)[0] + 1) * 127.5
    assert tensor[:, 0, 0].tolist() == pytest.approx([255, 255, 255])
    assert tensor[:, 0, 1].tolist() == pytest.approx([10, 20, 30], abs=1e-3)


def test_images_of_all_kinds_are_the_same() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    first, *others = (
        support_tensor(x, 16) for x in (Image.fromarray(pixels), pixels, pixels / 255, tensor, tensor[None])
    )
    assert first.shape == (1, 3, 16, 16)
    for other in others:
        torch.testing.assert_close(first, other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"elevations": [0]}, "got 1 elevations, 8 azimuths"),
        ({"distances": [1.5]}, "1 distances"),
        ({"elevations": [], "azimuths": []}, "none asked for"),
        ({"elevations": [91.0] * 8}, "between -90 and 90"),
        ({"azimuths": [float("nan")] * 8}, "not a finite number"),
        ({"distances": [0.4] * 8}, "radius 0.5"),
        ({"azimuths": 45.0}, "^azimuths: give a list of numbers"),
        ({"elevations": ["level"] * 8}, "^elevations: give a list of numbers"),
        ({"distances": 1.5}, "^distances: give a list of numbers"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": 1001}, "number of sampling steps is 1001"),
        ({"num_query": 0}, "num_query is 0"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0"),
        ({"output_type": "jpeg"}, "output_type 'jpeg'"),
        ({"image_size": 64}, "image_size is 64"),
        ({"latents": torch.zeros(3, 4, 8, 8)}, "8 views and noise for 3"),
        ({"latents": torch.zeros(8, 4, 4, 8)}, r"size \(4, 4, 8\) a view; the model's latents have \(4, 8, 8\)"),
        ({"num_query": 1.5}, "num_query is 1.5; use a whole number"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
    ],
)
def test_mistakes_are_named(pipeline, image, options, words) -> None:
    with pytest.raises(InputError, match=words):
        views(pipeline, image, **options)


def test_a_scheduler_that_cannot_start_from_pure_noise_makes_no_black_pictures(pipeline, image) -> None:
    pipeline.scheduler = DEISMultistepScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(InputError, match="DEISMultistepScheduler left the finite numbers; use euler"):
        views(pipeline, image)


def test_generators_of_each_view_are_refused(pipeline, image) -> None:
    with pytest.raises(InputError, match="^generator: is of type list; give one"):
        pipeline(image, [0], [30], generator=[torch.Generator()])


@pytest.mark.parametrize("bad", ["photo.png", np.zeros((8, 8)), torch.zeros(2, 3, 8, 8), np.full((8, 8, 3), np.nan)])
def test_a_bad_image_is_named(pipeline, bad) -> None:
    with pytest.raises(InputError, match="^image: "):
        views(pipeline, bad)


@pytest.mark.parametrize("part", ["unet", "vae", "adapter", "image_encoder"])
def test_a_missing_tensor_is_an_error_and_not_drawn_at_random(folder, tmp_path, part) -> None:
    shutil.copytree(folder, tmp_path / "damaged")
    (file,) = (tmp_path / "damaged" / part).glob("*.safetensors")
    tensors = load_file(file)
    key = sorted(tensors)[3]
    del tensors[key]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"{part}: tensor '{key}' is missing"):
        NVSAdapterPipeline.from_pretrained(tmp_path / "damaged")


def test_damaged_folders_end_in_one_line(folder, tmp_path) -> None:
    for name, content in (("unet/diffusion_pytorch_model.safetensors", b"x" * 99), ("vae/config.json", b"{")):
        damaged = tmp_path / name.split("/")[0]
        shutil.copytree(folder, damaged)
        (damaged / name).write_bytes(content)
        with pytest.raises(InputError) as error:
            NVSAdapterPipeline.from_pretrained(damaged)
        assert "\n" not in str(error.value) and str(damaged) in str(error.value)
    index = json.loads((folder / "model_index.json").read_text())
    index["model_config"]["colour"] = "red"
    shutil.copytree(folder, tmp_path / "index")
    (tmp_path / "index" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="colour"):
        NVSAdapterPipeline.from_pretrained(tmp_path / "index")


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_changes_nothing_but_the_place(image, offload, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # whose rounding differs between kernels
    options = {**EIGHT, "num_inference_steps": 2, "output_type": "np"}
    plain = quiet(NVSAdapterPipeline.from_model(tiny_nvs_model())).to("cuda")
    expected = plain(image, generator=torch.Generator("cuda").manual_seed(0), **options).images
    offloaded = quiet(NVSAdapterPipeline.from_model(tiny_nvs_model()))
    getattr(offloaded, offload)()
    for _ in range(2):
        found = offloaded(image, generator=torch.Generator("cuda").manual_seed(0), **options).images
        assert np.allclose(found, expected, atol=1e-4)
