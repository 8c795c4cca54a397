r"""Write the embedded model's card and contact sheet from what training left behind.

python scripts/mini_model_card.py outputs/mini/metrics.json outputs/mini/views.pt \
    --validation data/views/val.tar --train-index MESHES/index.json EXTRA_MESHES/index.json

``metrics.json`` holds ``pieces`` where training went on from the weights of an earlier one: ``steps``, ``samples`` of a
step, ``seconds`` and ``processes`` of each.
"""

import argparse
import json
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from nvsadapter_guidance.model import MINI_MODEL
from nvsadapter_guidance.training.views import composite, load_tar

ATTRIBUTION = {
    "BlendSwap-CC-0": "CC0 (winchesterSofa and winchesterArmchair: CC-BY 3.0), authors of blendswap.com: {authors}",
    "Scopia": "CC-BY 3.0, (c) 2010-2012 Scopia Visual Interfaces Systems, s.l., http://www.scopia.es",
    "KatorLegaz": "CC-BY 3.0 US, (c) 2003-2008 Andrew Kator & Jennifer Legaz",
    "Reallusion": "CC-BY 3.0 US, (c) 2008-2011 Reallusion, http://www.reallusion.com",
    "0ad-data": "CC-BY-SA 3.0, Wildfire Games, http://www.wildfiregames.com (Debian 0ad-data 0.0.26-1)",
    "megaglest-data": "CC-BY-SA 3.0, {authors}, http://glest.org and http://megaglest.org (Debian 3.13.0-3)",
    "fluent-emoji-3d": "MIT, Microsoft; packaged by LobeHub (npm @lobehub/fluent-emoji-3d 1.1.0); inflated into solids",
}
TEMPLATE = """# 3drec-mini

A small NVS-Adapter with its own UNet, autoencoder and image encoder, for 128-pixel views. It is made so that the whole
toolkit runs anywhere without a download; it knows little of the world, and its views are what {parameters:.1f} M
parameters and {gpu_minutes:.0f} GPU minutes buy.

![truth above, sampled views below, for eight objects never trained on](views.jpg)

Odd rows: renderings of validation objects at azimuths 0, 45, ... 315 degrees, elevation 0. Even rows: views sampled
from the first picture of the row above ({shown_steps} steps).

## Metrics

On the {val_count} validation objects, from the view at azimuth 0 and elevation 0 to azimuths 45 ... 315 at elevations 0
and 30; `python scripts/validate_mini.py --validation data/views/val.tar` prints them.

| | sampled views | copying the reference |
|---|---|---|
| PSNR, dB | {psnr:.2f} | {copy_psnr:.2f} |
| PSNR at elevation 0 / 30, dB | {psnr_elevation_0:.2f} / {psnr_elevation_30:.2f} | |
| silhouette IoU | {mask_iou:.3f} | |
| one-step denoising at half of the schedule, PSNR, dB | {one_step_psnr:.2f} | |
| views that turn the right way (azimuth 90 against 270, where they differ) | {turns_right:.0%} | |

## Training

{seen:.1f} million samples (1 support and 4 query views each) in {steps} steps, {gpu_minutes:.0f} GPU minutes of
{device} in {pieces} (training alone), after an autoencoder that reproduces training images at
{autoencoder_psnr:.1f} dB with colours that are {colour_error:.0%} off. Muon and AdamW, velocity prediction on a shifted
cosine schedule whose last step is pure noise, average of the weights with decay {ema}. The UNet, the adapter and the
image encoder are stored in eight bits.
`scripts/render_training_views.py` and `scripts/train_mini.py` make it from the data below; the record of the run is in
`benchmarks/results/`, what was tried in `docs/training-log.md`.

{remarks}

## Data

* {train_count} meshes, rendered from 20 or 40 views each, and bent into other shapes from 10 (`--variants`);
  mirrored and recoloured in training. BlendSwap, Scopia, KatorLegaz and Reallusion are libraries of the Debian package
  sweethome3d-furniture 1.8-1, of which {val_count} other meshes serve only for validation:
{attribution}
  Conversion to OBJ by Emmanuel Puybaret / eTeks (Sweet Home 3D). Changes: converted to GLB, decimated, textures shrunk,
  thin glass removed, scaled, rendered, recoloured. CC-BY 3.0: https://creativecommons.org/licenses/by/3.0/
* {procedural} procedural objects made by this project.

The weights are under the licence of the project (Apache-2.0).
"""


def contact_sheet(pictures: torch.Tensor, truth: torch.Tensor, objects: list[int]) -> Image.Image:
    """Rows of truth and samples; ``pictures (N, V, 3, H, W)`` bytes, ``truth (N, V, H, W, 3)`` in [0, 1]."""
    rows = []
    for index in objects:
        rows.append(torch.cat(list((truth[index, :8] * 255).round().byte()), dim=1))
        rows.append(torch.cat(list(pictures[index, :8].permute(0, 2, 3, 1)), dim=1))
    return Image.fromarray(torch.cat(rows).numpy())


def attribution(index: list[dict[str, Any]]) -> str:
    """One bullet for each library of the training meshes."""
    counts = Counter(entry["library"] for entry in index)
    lines = []
    for library, count in sorted(counts.items()):
        authors = sorted({e["creator"] for e in index if e["library"] == library and e["creator"]})
        lines.append(f"  - {library} ({count} meshes): {ATTRIBUTION[library].format(authors=', '.join(authors))}")
    return "\n".join(lines)


def main() -> None:
    """Write ``README.md`` and ``views.jpg`` beside the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path, help="metrics.json of train_mini.py")
    parser.add_argument("pictures", type=Path, help="views.pt of train_mini.py or --pictures of validate_mini.py")
    parser.add_argument("--validation", type=Path, required=True, help="validation views (.tar)")
    parser.add_argument("--train-index", type=Path, required=True, nargs="+", help="index.json of the training meshes")
    parser.add_argument("--shown-steps", type=int, default=20, help="denoising steps of the pictures")
    parser.add_argument("--remarks", default="", help="what else people should know")
    parser.add_argument("-o", "--output", type=Path, default=MINI_MODEL)
    arguments = parser.parse_args()
    metrics = json.loads(arguments.metrics.read_text())
    bank = load_tar(arguments.validation)
    pictures = torch.load(arguments.pictures, weights_only=True)
    chosen = list(range(0, len(pictures), max(len(pictures) // 8, 1)))[:8]
    sheet = contact_sheet(pictures, composite(bank.rgba[: len(pictures)].float() / 255), chosen)
    sheet.save(arguments.output / "views.jpg", quality=88)
    index = [entry for path in arguments.train_index for entry in json.loads(path.read_text())]
    own = {"samples": metrics["config"]["batch_size"] * metrics["processes"]}
    pieces = metrics.get("pieces") or [metrics | own]
    card = TEMPLATE.format(
        **metrics["scores"],
        attribution=attribution(index),
        parameters=metrics["parameters"] / 1e6,
        gpu_minutes=sum(piece["seconds"] * piece["processes"] for piece in pieces) / 60,
        seen=sum(piece["steps"] * piece["samples"] for piece in pieces) / 1e6,
        steps=sum(piece["steps"] for piece in pieces),
        pieces="one piece" if len(pieces) == 1 else f"{len(pieces)} pieces",
        ema=metrics["config"]["ema_decay"],
        device=metrics["device"],
        autoencoder_psnr=metrics["autoencoder"]["psnr"],
        colour_error=metrics["autoencoder"]["colour_error"],
        train_count=len(index),
        val_count=len(bank),
        procedural=metrics["procedural"],
        shown_steps=arguments.shown_steps,
        remarks=textwrap.fill(arguments.remarks, 120),
    )
    (arguments.output / "README.md").write_text(card)


if __name__ == "__main__":
    main()
