"""A whole reconstruction of a few tiny steps, from an image of four spheres; also a program that can be killed."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import spheres
import torch
from PIL import Image

from threedrec.cameras import orbit_cameras
from threedrec.config import load_config
from threedrec.config_schema import ExperimentConfig
from threedrec.loop import LoopRunner
from threedrec.reconstruct import Reconstruction

CONFIG = """
name: tiny
tag: test
recipe: none
data:
  image_path: IMAGE
  height: [16, 24]
  width: [16, 24]
  resolution_milestones: [3]
  default_azimuth_deg: 0.0
  default_camera_distance: 1.5
  default_fovy_deg: 49.1
  random_camera:
    height: [12, 16]
    width: [12, 16]
    batch_size: [4, 4]
    resolution_milestones: [3]
    camera_distance_range: [1.5, 1.5]
    fovy_range: [49.1, 49.1]
    eval_height: 24
    eval_width: 24
    eval_fovy_deg: 49.1
    n_val_views: 2
    n_test_views: 4
system:
  geometry:
    normal_type: analytic
    density_blob_scale: 10.0
    density_blob_std: 0.5
    pos_encoding_config: {otype: HashGrid, n_levels: 4, n_features_per_level: 2, log2_hashmap_size: 10,
                          base_resolution: 4, per_level_scale: 1.6}
    mlp_network_config: {otype: VanillaMLP, activation: ReLU, output_activation: none, n_neurons: 8, n_hidden_layers: 1}
  material: {ambient_only_steps: 100000}
  renderer: {num_samples_per_ray: 24, occupancy_resolution: 16, occupancy_interval: 4, return_normal_perturb: true}
  guidance_type: spheres-guidance
  guidance:
    warm_start: {num_views: 6, elevations: [0.0, 30.0], fit_steps: 6, rays_per_step: 128}
  freq: {guidance_eval: 4}
  exporter: {isosurface_resolution: 24, face_budget: 400, texture_size: 64}
trainer: {max_steps: 11, log_every_n_steps: 1, val_check_interval: 2}
checkpoint: {every_n_train_steps: 2, save_top_k: 0}
"""


def write_inputs(folder: Path) -> Path:
    """Write the image and the config; return the config."""
    rgb, mask = spheres.render_spheres(orbit_cameras(0.0, 0.0, 1.5, 49.1, 96, 96))
    rgba = torch.cat([rgb, mask], dim=-1)[0]
    Image.fromarray((rgba.numpy() * 255).astype(np.uint8)).save(folder / "spheres.png")
    config = folder / "tiny.yaml"
    config.write_text(CONFIG.replace("IMAGE", str(folder / "spheres.png")))
    return config


def tiny_config(config: Path, *overrides: str) -> ExperimentConfig:
    """Load the config that `write_inputs` wrote."""
    return load_config(config, list(overrides))


def main() -> None:
    """``tiny_run.py CONFIG RUN_DIR STAGE STEP``: train, and be killed after that step of that stage."""
    config, run_dir, stage, step = sys.argv[1:]
    torch.set_num_threads(1)
    descend = LoopRunner._descend

    def descend_or_die(self, loop, result, index):
        descend(self, loop, result, index)
        if (loop.stage, index) == (stage, int(step)):
            os.kill(os.getpid(), signal.SIGKILL)

    LoopRunner._descend = descend_or_die
    Reconstruction(tiny_config(Path(config)), Path(run_dir), "cpu").train()


if __name__ == "__main__":
    main()
