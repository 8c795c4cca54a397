"""Evaluation of reconstructed meshes against true ones, file by file."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.evaluation.mesh_alignment import align
from nvsadapter_guidance.evaluation.mesh_metrics import compare, measure, normalised
from nvsadapter_guidance.training.mesh_files import MESH_SUFFIXES, load_parts, whole_mesh


@dataclass
class MeshEvaluation:
    """Rows of the pairs that could be scored, and the others."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    """Name and reason."""


def find_truth(folder: Path) -> dict[str, Path]:
    """Mesh files of a folder by their names without suffix; where one name has several suffixes, the first known one.

    Raises:
        InputError: there are none.
    """
    found: dict[str, Path] = {}
    for path in _by_suffix(folder.iterdir() if folder.is_dir() else []):
        found.setdefault(path.stem, path)
    if not found:
        raise InputError(f"{folder}: holds no mesh ({', '.join(MESH_SUFFIXES)})")
    return dict(sorted(found.items()))


def find_prediction(folder: Path, name: str) -> Path:
    """The prediction of an object: ``NAME.glb`` (or another kind of mesh) or the one mesh below ``NAME/``.

    Below ``NAME/``, where a run leaves the same mesh in several formats, the first known format counts.

    Raises:
        InputError: there is none, or more than one.
    """
    beside = _by_suffix(path for path in folder.iterdir() if path.stem == name)
    if beside:
        return beside[0]
    below = _by_suffix((folder / name).rglob("*"))
    alike = [path for path in below if path.suffix.lower() == below[0].suffix.lower()]
    if len(alike) > 1:
        suffix = alike[0].suffix.lower()
        raise InputError(f"{folder / name}: holds {len(alike)} {suffix} files; leave the one to score")
    if alike:
        return alike[0]
    raise InputError(f"{folder}: holds no {name}{MESH_SUFFIXES[0]} and no folder {name} with a mesh")


def _by_suffix(paths: Iterable[Path]) -> list[Path]:
    """The mesh files among paths: those of the first known format first, and by name."""
    meshes = [path for path in paths if path.suffix.lower() in MESH_SUFFIXES and path.is_file()]
    return sorted(meshes, key=lambda path: (MESH_SUFFIXES.index(path.suffix.lower()), path))


def score_files(
    predictions: Path, truths: Mapping[str, Path], result: MeshEvaluation, store: Path, aligned: bool = True
) -> Iterator[str]:
    """Score the prediction of every true mesh into ``result``; both are brought to longest side 1 and centred.

    A row holds ``chamfer``, ``volume_iou`` and ``f_score`` of the meshes as they lie, and under ``aligned`` the same
    after the best similarity transform. True meshes without a prediction, and meshes that cannot be read, are entered
    as skipped.

    Args:
        store: folder for the rows, one file each; those of files that have not changed since are taken from there.

    Yields:
        every name when it is done.
    """
    for name, path in truths.items():
        try:
            prediction = find_prediction(predictions, name)
            result.rows.append(_stored_row(store / f"{name}.json", name, prediction, path, aligned))
        except InputError as error:
            result.skipped.append({"name": name, "reason": str(error)})
        yield name


def mean_scores(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of rows, key by key.

    Raises:
        InputError: there is no row.
    """
    if not rows:
        raise InputError("evaluation: no pair of meshes could be scored")
    result: dict[str, Any] = {}
    for key, value in rows[0].items():
        if isinstance(value, dict):
            result[key] = mean_scores([row[key] for row in rows])
        elif isinstance(value, float):
            result[key] = round(sum(row[key] for row in rows) / len(rows), 6)
    return result


def _stored_row(store: Path, name: str, prediction: Path, truth: Path, aligned: bool) -> dict[str, Any]:
    """The row that an earlier call left, if it is of the same files, or a new one, which is then kept."""
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in (prediction, truth)]
    stamp = json.loads(json.dumps([*states, aligned]))
    if store.exists():
        try:
            found = json.loads(store.read_text(encoding="utf-8"))
            if found["of"] == stamp:
                return dict(found["row"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{store}: cannot be read ({error}); delete it to score the object again") from error
    row = _row(name, _read(prediction), _read(truth), aligned)
    store.parent.mkdir(parents=True, exist_ok=True)
    temporary = store.with_name(f".{store.name}.{os.getpid()}")
    temporary.write_text(json.dumps({"of": stamp, "row": row}) + "\n", encoding="utf-8")
    temporary.replace(store)
    return row


def _read(path: Path) -> Any:
    return normalised(whole_mesh(load_parts(path, fit="none")))


def _row(name: str, prediction: Any, truth: Any, aligned: bool) -> dict[str, Any]:
    true = measure(truth, seed=1)
    row: dict[str, Any] = {"name": name, **asdict(compare(measure(prediction, seed=0), true))}
    if aligned:
        moved = prediction.copy().apply_transform(align(prediction, truth))
        row["aligned"] = asdict(compare(measure(moved, seed=0), true))
    return row
