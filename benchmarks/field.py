"""Times the field and the renderer: lookups, one training step, one picture. Run it on an idle machine.

    python benchmarks/field.py                      a small field, the size that CPU recipes use
    python benchmarks/field.py --profile            and the operations that dominate the training step
    python benchmarks/field.py --levels 16 --features 2 --log2-size 19 --scale 1.447 --samples 512 --device cuda

Times are the best of several runs, in milliseconds: "wall" as a clock shows them, "cpu" summed over threads (what
remains comparable when other programs run).
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from threedrec.cameras import RandomCameraConfig, orbit_cameras, turntable
from threedrec.field import EncodingConfig, ImplicitVolume, MLPConfig, SolidBackground
from threedrec.rendering import DiffusePointLight, VolumeRenderer


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--levels", type=int, default=5)
    parser.add_argument("--features", type=int, default=4, help="per level")
    parser.add_argument("--log2-size", type=int, default=15)
    parser.add_argument("--scale", type=float, default=2.0, help="resolution ratio of neighbouring levels")
    parser.add_argument("--neurons", type=int, default=32)
    parser.add_argument("--samples", type=int, default=96, help="steps along the diagonal of the box")
    parser.add_argument("--grid", type=int, default=64, help="occupancy cells per axis")
    parser.add_argument("--rays", type=int, default=4096)
    parser.add_argument("--points", type=int, default=118000, help="for the lookups")
    parser.add_argument("--size", type=int, default=256, help="pixels of the picture")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--profile", action="store_true")
    return parser.parse_args()


def build(args: argparse.Namespace) -> VolumeRenderer:
    """Return a renderer whose field is an opaque ball of radius 0.4 after a short fit, with its grid up to date."""
    torch.manual_seed(0)
    encoding = EncodingConfig(
        n_levels=args.levels,
        n_features_per_level=args.features,
        log2_hashmap_size=args.log2_size,
        per_level_scale=args.scale,
    )
    field = ImplicitVolume(
        ImplicitVolume.Config(
            normal_type="analytic",
            pos_encoding_config=encoding,
            mlp_network_config=MLPConfig(n_neurons=args.neurons),
            density_blob_scale=100.0,
            density_blob_std=0.4,
        )
    )
    config = VolumeRenderer.Config(num_samples_per_ray=args.samples, occupancy_resolution=args.grid)
    material, background = DiffusePointLight(DiffusePointLight.Config()), SolidBackground(SolidBackground.Config())
    renderer = VolumeRenderer(config, field, material, background).to(args.device)
    renderer.refresh(torch.Generator().manual_seed(0))
    return renderer


def report(name: str, function: Callable[[], object], args: argparse.Namespace) -> None:
    """Print the best wall and CPU time of ``function``."""
    wall, cpu = [], []
    for _ in range(args.repeats + 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        function()
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
    print(f"{name:<44} wall {min(wall[1:]) * 1e3:8.1f}   cpu {min(cpu[1:]) * 1e3:8.1f}")


def main() -> None:
    """Print all timings."""
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    renderer = build(args)
    field, generator = renderer.geometry, torch.Generator(args.device).manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}")

    points = torch.rand(args.points, 3, device=args.device, generator=generator)
    with torch.no_grad():
        report(f"encode {args.points} points", lambda: field.encoding(points), args)
    report("encode, backward", lambda: field.encoding(points).sum().backward(), args)
    report("encode with jacobian, backward", lambda: _both(field.encoding.with_jacobian(points)).backward(), args)
    report("occupancy grid, all cells", lambda: renderer.update(0, generator), args)

    side = round((args.rays / 4) ** 0.5)
    cameras = orbit_cameras(15.0, [0.0, 90.0, 180.0, 270.0], 1.5, 49.1, side, side).to(args.device)
    rays_o, rays_d = (rays.reshape(-1, 3) for rays in cameras.rays())

    def step(normals: bool) -> None:
        renderer.zero_grad(set_to_none=True)
        output = renderer(rays_o, rays_d, generator=generator, normals=normals)
        loss = (output.rgb - 0.5).square().mean() + output.opacity.mean()
        (loss + output.normal_image.mean() if normals else loss).backward()

    # A faint ball keeps nearly all samples, a solid one only its surface: what the start and the end of a fit cost.
    for name, scale in (("faint", 5.0), ("solid", 100.0)):
        field.config.density_blob_scale = scale
        renderer.refresh(torch.Generator().manual_seed(0))
        kept = len(renderer.sample(rays_o, rays_d, generator).ray_indices)
        share = kept / (len(rays_o) * args.samples)
        print(f"{name} ball: {len(rays_o)} rays, {kept} samples kept ({share:.0%} of {args.samples} a ray)")
        report("  training step", lambda: step(False), args)
        report("  training step with normals", lambda: step(True), args)
    frame = turntable(RandomCameraConfig(eval_fovy_deg=49.1), 1, args.size, args.size).to(args.device)
    report(f"picture {args.size} x {args.size} with normals", lambda: renderer.render_image(frame), args)

    if args.profile:
        field.config.density_blob_scale = 5.0
        renderer.refresh(torch.Generator().manual_seed(0))
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step(False)
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=32))


def _both(parts: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return parts[0].sum() + parts[1].sum()


if __name__ == "__main__":
    main()
