"""How good a result is, and what it cost."""

from threedrec.metrics.file import MetricsFile, StageTimer, peak_memory_gb, stage_numbers
from threedrec.metrics.image import mask_iou, psnr, ssim

__all__ = ["MetricsFile", "StageTimer", "mask_iou", "peak_memory_gb", "psnr", "ssim", "stage_numbers"]
