"""Image scores by hand, baselines, the folder of an object, and whole evaluations with models that are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_nvs import tiny_nvs_model
from zero123_objects import write_object as write_renderings

from nvsadapter_guidance.diffusers_pipeline import NVSAdapterPipeline
from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.evaluation.baselines import (
    MeanImage,
    NearestTrainingObject,
    TrainingViews,
    copied_reference,
    load_training_views,
)
from nvsadapter_guidance.evaluation.image_metrics import (
    MAX_PSNR,
    image_psnr,
    image_ssim,
    load_lpips,
    mask_iou,
    silhouette,
)
from nvsadapter_guidance.evaluation.imagine import Imagined, PipelineImagine
from nvsadapter_guidance.evaluation.object_folder import read_object, write_object
from nvsadapter_guidance.evaluation.pairs import find_pairs, mean_row, score_pairs
from nvsadapter_guidance.evaluation.picture_grid import evenly, picture_grid
from nvsadapter_guidance.evaluation.truth import TrueViews, evaluation_views, target_views
from nvsadapter_guidance.evaluation.view_scores import Evaluation, imagine_objects, score_objects
from nvsadapter_guidance.training.mesh_dataset import ViewSet, validation_views
from nvsadapter_guidance.training.zero123 import stored_folder


def true_views(name="a", views=8, size=32, seed=0):
    """Boxes of one colour that move from view to view."""
    random = np.random.default_rng(seed)
    rgba = np.zeros((views, size, size, 4), dtype=np.uint8)
    colour = random.integers(0, 200, 3)
    for index in range(views):
        left = 4 + index
        rgba[index, 8:24, left : left + 12] = (*colour, 255)
    return TrueViews(name, rgba)


def test_psnr_by_hand():
    target = torch.full((3, 3, 4, 4), 0.5)
    prediction = target + torch.tensor([0.0, 0.1, -0.01])[:, None, None, None]
    torch.testing.assert_close(image_psnr(prediction, target), torch.tensor([MAX_PSNR, 20.0, 40.0]), atol=1e-3, rtol=0)


def test_ssim_by_hand():
    flat = torch.full((2, 3, 16, 16), 0.5)
    other = flat.clone()
    other[1] = 0.7
    # without variance only the means count: (2 m1 m2 + c1) / (m1^2 + m2^2 + c1), c1 = 0.01^2
    expected = torch.tensor([1.0, (2 * 0.35 + 1e-4) / (0.25 + 0.49 + 1e-4)])
    torch.testing.assert_close(image_ssim(other, flat), expected, atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="SSIM needs images of 11x11"):
        image_ssim(flat[..., :10], flat[..., :10])


def test_silhouette_iou_by_hand():
    images = torch.ones(2, 3, 4, 4)
    images[0, 1, :2] = 0.5
    images[0, :, 3] = 0.96  # nearly white is background
    masks = silhouette(images)
    assert masks.sum((1, 2)).tolist() == [8, 0]
    edge = torch.ones(1, 3, 4, 4)
    edge[..., 0], edge[..., 1], edge[..., 2] = 0.2, 0.2 + 0.8 * 0.3, 0.9  # 0.8, 0.56 and 0.1 as dark as black
    assert silhouette(edge)[0, 0].tolist() == [True, True, False, False]
    target = torch.zeros(2, 4, 4, dtype=torch.bool)
    target[0, 1:3] = True
    torch.testing.assert_close(mask_iou(masks, target), torch.tensor([4 / 12, 1.0]))


def test_lpips_without_its_parts_is_one_line(monkeypatch):
    with pytest.raises(InputError, match="backbone 'resnet' is unknown; use one of alex, vgg, squeeze"):
        load_lpips("resnet")
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.image.lpip", None)
    with pytest.raises(InputError, match=r"LPIPS needs torchvision: pip install -e '\.\[metrics\]'"):
        load_lpips("alex")


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (RuntimeError("no operator nms\nmore"), r"torchvision does not fit torch .* \(no operator nms\); install both"),
        (OSError("no network"), r"cannot fetch the weights of alex \(no network\); put them into .*checkpoints"),
    ],
)
def test_lpips_that_cannot_start_says_what_to_do(monkeypatch, problem, words):
    def fail(**_):
        raise problem

    stub = SimpleNamespace(LearnedPerceptualImagePatchSimilarity=fail)
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.image.lpip", stub)
    with pytest.raises(InputError, match=words) as found:
        load_lpips("alex")
    assert "\n" not in str(found.value)


def test_cameras_are_half_level_and_half_above():
    assert evaluation_views(16) == validation_views()
    views = evaluation_views(8)
    assert views.azimuth == [0, 90, 180, 270] * 2 and views.elevation == [0] * 4 + [30] * 4
    assert target_views(views).tolist() == [False, True, True, True] * 2
    for count in (2, 7):
        with pytest.raises(InputError, match="use an even number from 4 on"):
            evaluation_views(count)


def test_true_views_are_blended_with_white():
    rgba = np.zeros((1, 1, 3, 4), dtype=np.uint8)
    rgba[0, 0] = [[255, 0, 0, 255], [255, 0, 0, 51], [0, 0, 0, 0]]
    truth = TrueViews("a", rgba)
    torch.testing.assert_close(truth.rgb[0, :, 0].T, torch.tensor([[1.0, 0, 0], [1, 0.8, 0.8], [1, 1, 1]]))
    assert truth.mask.tolist() == [[[True, False, False]]]


def test_the_mean_image_leaves_the_object_itself_out():
    mean, images = MeanImage(), [torch.full((2, 3, 4, 4), value) for value in (0.0, 0.3, 0.9)]
    for image in images:
        mean.add(image)
    torch.testing.assert_close(mean.without(images[0]), torch.full((2, 3, 4, 4), 0.6))
    alone = MeanImage()
    alone.add(images[0])
    assert alone.without(images[0]) is None


def test_the_nearest_training_object_is_turned_with_the_reference():
    """Object 1 looks like the reference at azimuth 50, so 90 degrees further is azimuth 140."""
    azimuth = torch.tensor([0.0, 90, 180, 270, 50, 140, 230, 320])
    colours = torch.tensor([200, 210, 220, 230, 90, 110, 130, 150])
    rgb = colours.byte()[:, None, None, None].expand(8, 3, 32, 32).contiguous()
    training = TrainingViews(rgb, azimuth, torch.zeros(8), torch.tensor([0] * 4 + [1] * 4))
    nearest = NearestTrainingObject(training)
    found = nearest(torch.full((3, 32, 32), 92 / 255), ViewSet([0.0, 90.0, 180.0, 265.0], [0.0, 0, 30, 0], 1.0))
    assert (found[:, 0, 0, 0] * 255).round().tolist() == [90, 110, 130, 150]


def test_training_views_are_read_from_a_folder_of_renderings(tmp_path):
    for name in "ab":
        write_renderings(tmp_path / name, views=4)
    found = load_training_views(tmp_path, 16)
    assert found.rgb.shape == (8, 3, 16, 16) and found.objects.tolist() == [0] * 4 + [1] * 4
    position = np.linalg.inv(np.vstack([stored_folder(tmp_path / "a", count=4).world_to_camera(2), [0, 0, 0, 1]]))[
        :3, 3
    ]
    azimuth = np.degrees(np.arctan2(position[1], position[0])) % 360
    assert found.azimuth[2] == pytest.approx(azimuth, abs=1e-3)
    for path in (tmp_path / "none", tmp_path / "a"):
        with pytest.raises(InputError):
            load_training_views(path, 16)


def test_an_object_comes_back_from_its_folder(tmp_path):
    truth = true_views()
    views = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    write_object(tmp_path / "a", truth, Imagined(views, truth.rgb))
    found = read_object(tmp_path / "a")
    assert np.array_equal(found.truth.rgba, truth.rgba) and found.truth.name == "a"
    torch.testing.assert_close(found.predicted, views, atol=0.51 / 255, rtol=0)
    assert found.one_step_psnr == [MAX_PSNR] * 8
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    (tmp_path / "a" / "pred_003.png").unlink()
    with pytest.raises(InputError, match="delete it to evaluate the object again"):
        read_object(tmp_path / "a")


class Render:
    """Stands in for the renderer; refuses one object."""

    views = evaluation_views(8)

    def __call__(self, name, path):
        if name == "broken":
            raise InputError("broken.glb: cannot be read")
        return true_views(name, seed=len(name))


def test_a_perfect_model_scores_perfectly_and_copying_scores_as_the_baseline(tmp_path):
    meshes = {name: tmp_path / f"{name}.glb" for name in ("a", "broken", "bb")}
    scores = {}
    for kind, answer in (("perfect", lambda rgb: rgb), ("copy", copied_reference)):
        result = Evaluation()
        done = imagine_objects(meshes, Render(), lambda n, rgb, v, f=answer: Imagined(f(rgb)), tmp_path / kind, result)
        assert list(done) == list(meshes)
        assert result.skipped == [{"name": "broken", "reason": "broken.glb: cannot be read"}]
        scores[kind] = score_objects(result.folders, Render.views)
    perfect, copy = scores["perfect"], scores["copy"]
    assert perfect["mean"] == pytest.approx({"psnr": MAX_PSNR, "ssim": 1.0, "mask_iou": 1.0}, abs=1e-4)
    assert copy["mean"] == copy["baselines"]["copy-reference"] == perfect["baselines"]["copy-reference"]
    assert copy["mean"]["psnr"] < 20 and copy["baselines"]["mean-image"]["psnr"] < copy["mean"]["psnr"] + 20
    first = copy["objects"][0]
    assert first["name"] == "a" and [view["azimuth"] for view in first["views"]] == [90, 180, 270] * 2
    assert first["psnr"] == pytest.approx(np.mean([view["psnr"] for view in first["views"]]), abs=1e-4)


def test_one_object_has_no_mean_image(tmp_path):
    result = Evaluation()
    list(imagine_objects({"a": tmp_path}, Render(), lambda n, rgb, v: Imagined(rgb), tmp_path / "o", result))
    assert score_objects(result.folders, Render.views)["baselines"]["mean-image"]["psnr"] is None
    with pytest.raises(InputError, match="not one object could be imagined"):
        score_objects({}, Render.views)


def test_finished_objects_are_not_imagined_again(tmp_path):
    calls = []

    def imagine(name, rgb, views):
        calls.append(name)
        return Imagined(rgb)

    for _ in range(2):
        list(imagine_objects({"a": tmp_path, "bb": tmp_path}, Render(), imagine, tmp_path / "o", Evaluation()))
    assert calls == ["a", "bb"]


def test_a_pipeline_sees_the_reference_alone_and_repeats_itself():
    pipeline = NVSAdapterPipeline.from_model(tiny_nvs_model())
    pipeline.set_progress_bar_config(disable=True)
    steps, truth, views = [], true_views().rgb, evaluation_views(8)
    imagine = PipelineImagine(pipeline, 2, 2.0, on_step=lambda: steps.append(1))
    first = imagine("a", truth, views)
    assert first.views.shape == first.one_step.shape == (8, 3, 32, 32) and len(steps) == 2
    blind = imagine("a", torch.cat([truth[:1], torch.zeros_like(truth[1:])]), views)
    assert torch.equal(blind.views, first.views) and not torch.equal(blind.one_step, first.one_step)
    assert not torch.equal(imagine("b", truth, views).views, first.views)


def test_the_grid_shows_truth_above_prediction(tmp_path):
    truth = true_views()
    write_object(tmp_path / "a", truth, Imagined(torch.zeros(8, 3, 32, 32)))
    found = read_object(tmp_path / "a")
    sheet = np.asarray(picture_grid([found, found], ["a", "b"], evaluation_views(8), cell=32))
    assert sheet.shape == (20 + 2 * (64 + 6), 150 + 8 * 32, 3)
    np.testing.assert_array_equal(sheet[20:52, 150:182], (truth.rgb[0].permute(1, 2, 0) * 255).round().byte().numpy())
    assert not sheet[52:84, 150:].any()


def test_pictures_are_chosen_evenly():
    assert evenly(3, 12) == [0, 1, 2]
    assert evenly(30, 4) == [0, 10, 19, 29]
    assert evenly(30, 1) == [0]


def test_pairs_as_the_release_keeps_them(tmp_path):
    target = np.full((16, 16, 4), (255, 0, 0, 255), dtype=np.uint8)
    target[8:, :, 3] = 0  # white, whatever its colour
    prediction = np.full((16, 16, 3), 255, dtype=np.uint8)
    prediction[:8] = (255, 0, 51)  # 0.2 off in one of three channels of one half: mse 0.04 / 6
    for name in ("x/one", "two", "lone", "small"):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(target).save(tmp_path / name / "target.png")
    for name in ("x/one", "two"):
        Image.fromarray(prediction).save(tmp_path / name / "pred.png")
    Image.fromarray(prediction[:12]).save(tmp_path / "small" / "pred.png")
    rows = []
    problems = [p for p in score_pairs(find_pairs(tmp_path), None, rows) if p]
    assert [row["name"] for row in rows] == ["two", "x/one"] and {p["name"] for p in problems} == {"lone", "small"}
    assert mean_row(rows)["psnr"] == pytest.approx(-10 * np.log10(0.04 / 6), abs=1e-3)
    with pytest.raises(InputError, match=r"no folder below it holds a target\.png"):
        find_pairs(tmp_path / "two" / "none")
    with pytest.raises(InputError, match="nothing could be scored"):
        mean_row([])
