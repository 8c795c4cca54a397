import time
from pathlib import Path

import pytest
import torch

from threedrec.errors import InputError
from threedrec.files import read_json
from threedrec.metrics import MetricsFile, mask_iou, peak_memory_gb, psnr, ssim


def test_psnr_by_hand() -> None:
    black = torch.zeros(2, 4, 4, 3)
    assert psnr(black + 0.1, black).item() == pytest.approx(20.0, abs=1e-4)  # mse 0.01
    half = black.clone()
    half[0] = 1.0  # mse 0.5, over all pixels together
    assert psnr(half, black).item() == pytest.approx(3.0103, abs=1e-4)
    assert psnr(black, black).item() == float("inf")


def test_ssim_is_that_of_torchmetrics() -> None:
    twin = pytest.importorskip("torchmetrics.functional.image").structural_similarity_index_measure
    image = torch.rand(3, 40, 52, 3, generator=torch.Generator().manual_seed(0))
    other = (image + 0.2 * torch.rand(image.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    planes = [images.permute(0, 3, 1, 2) for images in (image, other)]
    assert ssim(image, other).item() == pytest.approx(float(twin(*planes, data_range=1.0)), abs=1e-5)


def test_ssim_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 16, 16, 3, generator=generator)
    assert ssim(image, image).item() == pytest.approx(1.0, abs=1e-5)
    # Constant images have no variance: what is left is (2ab + c1) / (a² + b² + c1) with c1 = 0.01².
    a, b, c1 = 0.2, 0.6, 1e-4
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert ssim(torch.full_like(image, a), torch.full_like(image, b)).item() == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="11×11"):
        ssim(image[:, :8], image[:, :8])


def test_mask_iou_by_hand() -> None:
    first, second = torch.zeros(1, 4, 4, 1), torch.zeros(1, 4, 4, 1)
    assert mask_iou(first, second).item() == 1.0
    first[:, :2] = 1.0  # 8 pixels
    second[:, 1:3] = 0.9  # 8 pixels, 4 of them shared
    assert mask_iou(first, second).item() == pytest.approx(4 / 12)
    with pytest.raises(ValueError, match=r"\(1, 4, 4, 1\) and \(1, 2, 4, 1\)"):
        mask_iou(first, second[:, :2])


def test_the_metrics_file_nests_merges_and_survives_a_restart(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "run" / "metrics.json")
    metrics.set("reference.psnr", torch.tensor(21.5))
    metrics.update({"reference": {"ssim": 0.9}, "model": "mini", "losses.rgb": float("nan")})
    again = MetricsFile(tmp_path / "run" / "metrics.json")
    again.set("mesh.vertices", 12)
    expected = {
        "reference": {"psnr": 21.5, "ssim": 0.9},
        "model": "mini",
        "losses": {"rgb": None},
        "mesh": {"vertices": 12},
    }
    assert read_json(tmp_path / "run" / "metrics.json") == expected == again.values
    assert again.get("reference.psnr") == 21.5
    assert again.get("reference.nothing", 3) == 3


def test_a_metrics_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("[1]")
    with pytest.raises(InputError, match=r"metrics\.json: not a metrics file"):
        MetricsFile(tmp_path / "metrics.json")


def test_a_stage_writes_seconds_and_memory_also_when_it_fails(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.json")
    with pytest.raises(KeyError), metrics.stage("fit"):
        time.sleep(0.05)
        raise KeyError
    assert 0.05 <= metrics.get("stages.fit.seconds") < 5
    assert 0.01 < metrics.get("stages.fit.peak_memory_gb") < 100


def test_a_resumed_stage_adds_its_seconds(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.json")
    metrics.set("stages.fit", {"seconds": 100.0, "peak_memory_gb": 999.0})
    with metrics.stage("fit", resumed=True) as timer:
        timer.flush()
        assert MetricsFile(metrics.path).get("stages.fit.seconds") >= 100.0
    assert metrics.get("stages.fit.peak_memory_gb") == 999.0
    with metrics.stage("fit"):
        pass
    assert metrics.get("stages.fit.seconds") < 1.0


def test_peak_memory_sees_a_large_tensor(tmp_path: Path) -> None:
    before = peak_memory_gb()
    tensor = torch.ones(50_000_000)  # 0.2 GB
    assert peak_memory_gb() >= min(before, 0.2)
    assert tensor.sum() > 0
