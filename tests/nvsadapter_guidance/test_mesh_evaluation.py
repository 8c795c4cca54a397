"""Mesh scores against values worked out by hand, the alignment, and whole folders."""

import numpy as np
import pytest
import trimesh
from trimesh.transformations import rotation_matrix

from nvsadapter_guidance.errors import InputError
from nvsadapter_guidance.evaluation.mesh_alignment import align
from nvsadapter_guidance.evaluation.mesh_metrics import (
    chamfer,
    compare,
    dense_points,
    f_score,
    measure,
    nearest_distances,
    normalised,
    solid,
    volume_iou,
)
from nvsadapter_guidance.evaluation.mesh_scores import (
    MeshEvaluation,
    find_prediction,
    find_truth,
    mean_scores,
    score_files,
)


def cube(shift=0.0, side=1.0):
    return trimesh.creation.box((side,) * 3, trimesh.transformations.translation_matrix([shift, 0, 0]))


def ball(radius):
    return trimesh.creation.icosphere(4, radius)


def lopsided():
    """A mesh that no turn brings onto itself."""
    parts = [
        trimesh.creation.box((1.0, 0.3, 0.5)),
        trimesh.creation.icosphere(2, 0.2),
        trimesh.creation.box((0.2,) * 3),
    ]
    parts[1].apply_translation([0.4, 0.3, 0.1])
    parts[2].apply_translation([-0.3, 0.2, -0.2])
    return normalised(trimesh.util.concatenate(parts))


def test_two_unit_spheres_are_equal_up_to_the_sample():
    scores = compare(measure(ball(0.5), 0), measure(ball(0.5), 1))
    # a point has its nearest of n uniform ones on an area A at 0.5 sqrt(A / n) in the mean
    assert scores.chamfer == pytest.approx(0.5 * np.sqrt(np.pi / 100_000), rel=0.02)
    assert scores.volume_iou == 1.0
    assert scores.f_score["0.01"] > 0.999 and scores.f_score["0.02"] == scores.f_score["0.05"] == 1.0


def test_two_concentric_spheres_by_hand():
    scores = compare(measure(ball(0.5), 0, 20_000), measure(ball(0.47), 1, 20_000))
    assert scores.chamfer == pytest.approx(0.03, abs=0.001)
    assert scores.volume_iou == pytest.approx((0.47 / 0.5) ** 3, abs=0.02)
    assert scores.f_score == {"0.01": 0.0, "0.02": 0.0, "0.05": 1.0}


@pytest.mark.parametrize("shift", [0.0, 0.25, 0.5, 1.0])
def test_shifted_cubes_overlap_by_hand(shift):
    assert volume_iou(solid(cube()), solid(cube(shift))) == (1 - shift) / (1 + shift)


def test_distances_of_two_points_by_hand():
    first, second = np.array([[0.0, 0, 0], [1, 0, 0]]), np.array([[0.0, 0.5, 0]])
    distances = nearest_distances(first, second)
    assert chamfer(*distances) == pytest.approx(((0.5 + np.sqrt(1.25)) / 2 + 0.5) / 2)
    # precision 1/2, recall 1
    assert f_score(*distances, 0.6) == pytest.approx(2 / 3)
    assert f_score(*distances, 0.4) == 0.0


def test_a_cube_fills_half_of_the_grid_to_each_side():
    volume = solid(cube())
    assert volume.shape == (64, 64, 64) and volume.sum() == 32**3
    assert volume[16:48, 16:48, 16:48].all()
    assert solid(cube(side=4.0)).all(), "the grid lies inside"
    assert solid(cube(side=1.5)).sum() == 48**3


def test_points_lie_dense_on_a_triangle():
    triangle = np.array([[[0.0, 0, 0], [3, 0, 0], [0, 4, 0]]])
    (points,) = dense_points(triangle, 1.0)
    assert points.shape == (21, 3)  # five parts along each side
    for corner in triangle[0]:
        assert np.linalg.norm(points - corner, axis=1).min() < 1e-12
    assert (points[:, 0] / 3 + points[:, 1] / 4 <= 1 + 1e-12).all() and (points >= 0).all()
    small = triangle / 100
    assert sorted(map(len, dense_points(np.concatenate([triangle, small, small]), 1.0))) == [6, 21]


def test_winding_overlaps_and_cavities_do_not_matter():
    turned = cube()
    turned.faces[::2] = turned.faces[::2, ::-1]
    overlapping = trimesh.util.concatenate([cube(), cube(side=0.5)])
    overlapping_flipped = cube(side=0.5)
    overlapping_flipped.invert()
    for mesh in (turned, overlapping, trimesh.util.concatenate([cube(), overlapping_flipped])):
        assert np.array_equal(solid(mesh), solid(cube()))


def test_an_open_surface_has_no_volume():
    bowl = cube()
    bowl.update_faces(bowl.face_normals[:, 1] < 0.5)
    assert solid(bowl).mean() < 0.2 * solid(cube()).mean()


def test_normalised_is_centred_with_longest_side_1():
    mesh = trimesh.creation.box((2.0, 4.0, 1.0), trimesh.transformations.translation_matrix([5, 6, 7]))
    np.testing.assert_allclose(normalised(mesh).bounds, [[-0.25, -0.5, -0.125], [0.25, 0.5, 0.125]])
    assert mesh.bounds[0, 0] == 4.0, "the mesh itself stays"


def test_alignment_undoes_a_turn_a_shift_and_a_scale():
    truth = lopsided()
    moved = truth.copy().apply_transform(rotation_matrix(1.2, [0, 1, 0]))
    moved.apply_scale(0.9).apply_translation([0.05, 0.0, -0.03])
    before = compare(measure(moved, 0, 5000), measure(truth, 1, 5000))
    after = compare(measure(moved.apply_transform(align(moved, truth)), 0, 5000), measure(truth, 1, 5000))
    assert before.volume_iou < 0.7 and after.volume_iou > 0.9
    assert after.chamfer < 0.015 < before.chamfer


def test_alignment_leaves_what_lies_well():
    assert np.array_equal(align(lopsided(), lopsided()), np.eye(4))


def test_folders_are_scored_pair_by_pair(tmp_path):
    truth, predictions, result = tmp_path / "truth", tmp_path / "predictions", MeshEvaluation()
    (predictions / "b" / "save").mkdir(parents=True)
    truth.mkdir()
    for name in "abcd":
        cube().export(truth / f"{name}.glb")
    cube(7.0, 3.0).export(predictions / "a.ply")  # moved and scaled: the same after normalisation
    ball(1.0).export(predictions / "b" / "save" / "mesh.glb")
    ball(1.0).export(predictions / "b" / "save" / "mesh.obj")
    (predictions / "d.glb").write_bytes(b"rubbish")
    store = tmp_path / "rows"
    assert list(score_files(predictions, find_truth(truth), result, store, aligned=False)) == list("abcd")
    first, second = result.rows
    assert (first["name"], first["volume_iou"]) == ("a", 1.0) and "aligned" not in first
    assert second["volume_iou"] == pytest.approx(np.pi / 6, abs=0.01)
    assert [entry["name"] for entry in result.skipped] == ["c", "d"]
    assert "no c.glb and no folder c" in result.skipped[0]["reason"]
    mean = mean_scores(result.rows)
    assert mean["volume_iou"] == pytest.approx((1 + second["volume_iou"]) / 2, abs=1e-6)
    assert set(mean["f_score"]) == {"0.01", "0.02", "0.05"}
    kept = (store / "a.json").read_text()
    (store / "a.json").write_text(kept.replace('"volume_iou": 1.0', '"volume_iou": 0.125'))
    again = MeshEvaluation()
    list(score_files(predictions, find_truth(truth), again, store, aligned=False))
    assert again.rows[0]["volume_iou"] == 0.125, "rows of unchanged files are not made again"
    cube(0.0, 2.0).export(predictions / "a.ply")
    again = MeshEvaluation()
    list(score_files(predictions, find_truth(truth), again, store, aligned=False))
    assert again.rows[0]["volume_iou"] == 1.0


def test_the_aligned_variant_is_labelled(tmp_path):
    lopsided().export(tmp_path / "a.glb")
    (tmp_path / "p").mkdir()
    lopsided().apply_transform(rotation_matrix(np.pi / 2, [0, 1, 0])).export(tmp_path / "p" / "a.glb")
    result = MeshEvaluation()
    list(score_files(tmp_path / "p", find_truth(tmp_path), result, tmp_path / "rows"))
    row = result.rows[0]
    assert row["aligned"]["volume_iou"] > 0.95 > row["volume_iou"] and row["aligned"]["chamfer"] < row["chamfer"]
    assert mean_scores(result.rows)["aligned"]["f_score"]["0.05"] == 1.0


def test_formats_are_known_in_capitals_too(tmp_path):
    for path in (tmp_path / "A.GLB", tmp_path / "p" / "A" / "Mesh.Obj"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert find_truth(tmp_path) == {"A": tmp_path / "A.GLB"}
    assert find_prediction(tmp_path, "A") == tmp_path / "A.GLB"
    assert find_prediction(tmp_path / "p", "A") == tmp_path / "p" / "A" / "Mesh.Obj"


def test_what_is_missing_or_doubtful_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no mesh"):
        find_truth(tmp_path)
    with pytest.raises(InputError, match="no pair of meshes"):
        mean_scores([])
    (tmp_path / "a").mkdir()
    for name in ("1.glb", "2.glb"):
        (tmp_path / "a" / name).touch()
    with pytest.raises(InputError, match=r"holds 2 \.glb files"):
        find_prediction(tmp_path, "a")
