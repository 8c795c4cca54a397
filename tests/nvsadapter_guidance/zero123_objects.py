"""Objects in the layout of Zero-1-to-3's renderings, made without rendering."""

from pathlib import Path

import numpy as np

from nvsadapter_guidance.training.zero123 import camera_matrix, encode_views


def write_object(folder: Path, views: int = 12, size: int = 16, seed: int = 0) -> Path:
    """Views of one colour each, its red the number of the view, with a transparent rim of dark pixels."""
    random = np.random.default_rng(seed)
    rgba = np.zeros((views, size, size, 4), dtype=np.uint8)
    rgba[:, 2:-2, 2:-2, 3] = 255
    rgba[:, 2:-2, 2:-2, 0] = 10 * np.arange(views)[:, None, None]
    angles = [(360 * random.random(), 120 * random.random() - 60, 1.5 + 0.7 * random.random()) for _ in range(views)]
    folder.mkdir(parents=True)
    for name, content in encode_views(rgba, np.stack([camera_matrix(*angle) for angle in angles])).items():
        (folder / name).write_bytes(content)
    return folder
