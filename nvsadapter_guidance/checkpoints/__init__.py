"""Checkpoints of Stable Diffusion, of CLIP, of the released NVS-Adapter and of ours: read safely, strictly, once."""

from nvsadapter_guidance.checkpoints.convert import convert_released, to_released
from nvsadapter_guidance.checkpoints.identify import CheckpointReport, identify
from nvsadapter_guidance.checkpoints.loading import load_adapter, load_released

__all__ = ["CheckpointReport", "convert_released", "identify", "load_adapter", "load_released", "to_released"]
