"""Full-size random weights in the released layouts: our loading against diffusers' own, in values, memory and time.

    python benchmarks/released_parity.py --family sd21 --output benchmarks/results/released_parity_sd21.json
    python benchmarks/released_parity.py --family sd15 --device cpu --half     half the disk, slow
    python benchmarks/released_parity.py --measure FILE [--dtype float16] [--device cuda]

The first two write a whole released checkpoint (10 GB) and the Stable Diffusion file inside it (5 GB) into a temporary
folder, load the one with this project and the other with ``from_single_file`` of diffusers (offline, its configuration
from a local folder), and compare UNet and autoencoder, the adapter switched off. The last one only loads a file in a
process of its own and prints seconds and peak host memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from nvsadapter_guidance.checkpoints.families import full_size_config
from nvsadapter_guidance.checkpoints.parts import Blueprint
from nvsadapter_guidance.checkpoints.released import TEXT_PREFIX, adapter_slots, frozen_slots
from nvsadapter_guidance.checkpoints.released_config import IMAGE_PREFIX
from nvsadapter_guidance.checkpoints.slots import give
from nvsadapter_guidance.conversion import adapter_key_map
from nvsadapter_guidance.full_size import random_model
from nvsadapter_guidance.weights import load_model

COMMON: dict[str, Any] = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
TEXT: dict[str, dict[str, Any]] = {
    "sd21": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
             "hidden_act": "gelu", "pad_token_id": 0},
    "sd15": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
             "hidden_act": "quick_gelu", "pad_token_id": 49407},
}  # fmt: skip
# The published configurations of the two models in diffusers layout, independent of this project's own.
UNETS: dict[str, dict[str, Any]] = {
    "sd21": {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
    "sd15": {"attention_head_dim": 8, "cross_attention_dim": 768},
}
VAE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=list(UNETS), default="sd21")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--half", action="store_true", help="write the files in float16")
    parser.add_argument("--folder", help="for the files; default: a temporary one")
    parser.add_argument("--keep", action="store_true", help="leave the files in --folder")
    parser.add_argument("--output", help="JSON file for the numbers")
    parser.add_argument("--measure", metavar="FILE", help="only load this file, and print seconds and peak memory")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    return parser.parse_args()


def host_peak() -> int:
    """Largest resident memory of this process so far in bytes, mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Load a file in this process."""
    torch.zeros(1, device=options.device)
    before, start, size = host_peak(), time.perf_counter(), Path(options.measure).stat().st_size
    load_model(options.measure, dtype=getattr(torch, options.dtype), device=options.device)
    if options.device != "cpu":
        torch.cuda.synchronize()
    peak = host_peak()
    return {
        "dtype": options.dtype,
        "device": options.device,
        "file_GB": round(size / 1e9, 3),
        "seconds": round(time.perf_counter() - start, 2),
        "host_peak_GB": round(peak / 1e9, 3),
        "host_before_GB": round(before / 1e9, 3),
        "host_peak_over_file": round(peak / size, 3),
    }


@torch.no_grad()
def released_tensors(family: str, device: str) -> dict[str, Tensor]:
    """Every tensor of a released checkpoint, random, on the CPU."""
    config = full_size_config(family)
    config.text_encoder = {**COMMON, **TEXT[family]}
    blueprint = Blueprint(config)
    blueprint.model = random_model(config, device).cpu()
    torch.manual_seed(1)
    blueprint.text_encoder = CLIPTextModel(CLIPTextConfig(**config.text_encoder))
    marker = {f"{TEXT_PREFIX}transformer.text_model.x": torch.empty(0)} if family == "sd15" else {}
    # The text tower of the file has one layer more than is used, hence the 24 of TEXT.
    slots = frozen_slots(blueprint, marker)
    tensors = give(blueprint.state_dict(), {**slots, **adapter_slots(blueprint, use_ema=False)})
    average = give(blueprint.state_dict(), adapter_slots(blueprint, use_ema=True))
    tensors |= {key: value + 0.01 * torch.randn(value.shape) for key, value in average.items()}
    for prefix in [f"{TEXT_PREFIX}model."] * (family == "sd21") + [IMAGE_PREFIX]:
        tensors[f"{prefix}text_projection"] = torch.randn(1024, 1024)
        tensors[f"{prefix}logit_scale"] = torch.tensor(4.6)
    rest = {"positional_embedding": (77, 1024), "token_embedding.weight": (49408, 1024), "ln_final.weight": (1024,),
            "ln_final.bias": (1024,)}  # fmt: skip
    tensors |= {f"{IMAGE_PREFIX}{key}": torch.randn(shape) for key, shape in rest.items()}
    tensors |= {"denoiser.sigmas": torch.linspace(0.03, 14.6, 1000), "model_ema.decay": torch.tensor(0.9995)}
    return {**tensors, "model_ema.num_updates": torch.tensor(200000, dtype=torch.int32)}


def ldm_tensors(released: dict[str, Tensor], adapter_keys: set[str]) -> dict[str, Tensor]:
    """The Stable Diffusion model inside, in its own file's names."""
    start = "model.diffusion_model.unet."
    tensors = {"betas": torch.linspace(0.00085, 0.012, 1000)}
    for key, value in released.items():
        if key.startswith(start) and key not in adapter_keys:
            tensors[f"model.diffusion_model.{key.removeprefix(start)}"] = value
        elif key.startswith("first_stage_model."):
            tensors[key] = value
        elif key.startswith(TEXT_PREFIX):
            tensors[f"cond_stage_model.{key.removeprefix(TEXT_PREFIX)}"] = value
    return tensors


def write_files(options: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """The released checkpoint and the Stable Diffusion file."""
    tensors = released_tensors(options.family, options.device)
    if options.half:
        tensors = {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
    with torch.device("meta"):
        blueprint = Blueprint(full_size_config(options.family))
    names = adapter_key_map(blueprint.model.network.adapter, blueprint.model.network.unet).values()
    ldm = ldm_tensors(tensors, {f"model.diffusion_model.{name}" for name in names})
    checkpoint, plain = folder / "random_step_1.ckpt", folder / "plain.safetensors"
    torch.save({"state_dict": tensors, "global_step": 1}, checkpoint)
    save_file({key: value.contiguous() for key, value in ldm.items()}, plain)
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(sample_size=64, **UNETS[options.family]), AutoencoderKL(**VAE)
    # Written by diffusers: its conversion reads keys that a published file may leave to their defaults.
    unet.save_config(folder / "unet")
    vae.save_config(folder / "vae")
    return checkpoint, plain


@torch.no_grad()
def compare(options: argparse.Namespace, folder: Path, checkpoint: Path, plain: Path) -> dict[str, Any]:
    """Largest differences between our UNet and autoencoder and those of diffusers."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device(options.device)
    ours = load_model(str(checkpoint), device=device)
    options_theirs = {"config": str(folder), "torch_dtype": torch.float32, "local_files_only": True}
    unet = UNet2DConditionModel.from_single_file(str(plain), subfolder="unet", **options_theirs).to(device).eval()
    vae = AutoencoderKL.from_single_file(str(plain), subfolder="vae", **options_theirs).to(device).eval()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 32, 32, generator=generator).to(device)
    images = (torch.rand(2, 3, 256, 256, generator=generator) * 2 - 1).to(device)
    timesteps, text = torch.tensor([0, 500, 999], device=device), ours.text_tokens().expand(3, -1, -1)
    pairs = {
        "unet": [model(latents, timesteps, text).sample for model in (ours.network.unet, unet)],
        "vae_encode": [model.encode(images).latent_dist.parameters for model in (ours.vae, vae)],
        "vae_decode": [model.decode(latents[:2]).sample for model in (ours.vae, vae)],
    }
    result: dict[str, Any] = {}
    for name, (mine, theirs) in pairs.items():
        result[name] = {"max_abs_difference": (mine - theirs).abs().max().item(), "std": theirs.std().item()}
    same = [ours.network.unet.state_dict(), unet.state_dict(), ours.vae.state_dict(), vae.state_dict()]
    result["tensors_equal"] = all(
        mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
        for mine, theirs in (same[:2], same[2:])
    )
    return result


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write, compare, measure."""
    checkpoint, plain = write_files(options, folder)
    result: dict[str, Any] = {"family": options.family, "device": options.device, "torch": torch.__version__}
    result |= compare(options, folder, checkpoint, plain)
    result["loading"] = []
    for dtype in ("float32", "float16"):
        command = [sys.executable, __file__, "--measure", str(checkpoint), "--dtype", dtype, "--device", options.device]
        result["loading"].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    if options.keep:
        return result
    for path in (checkpoint, plain):
        path.unlink()
    return result


def main() -> None:
    """Entry."""
    options = parse()
    if options.measure:
        result = measure(options)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(options.folder or scratch)
            folder.mkdir(parents=True, exist_ok=True)
            result = run(options, folder)
    print(json.dumps(result, indent=2))
    if options.output:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
