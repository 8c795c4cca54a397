"""Shapes bent out of meshes."""

import math

import numpy as np
import pytest
import torch
import trimesh

from nvsadapter_guidance.training.vary_mesh import Variation, rippled, tapered, twisted, varied


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shapes_fill_the_sphere_and_leave_the_mesh_alone() -> None:
    parts = [trimesh.creation.box([1.0, 0.4, 0.2]), trimesh.creation.icosphere(radius=0.2)]
    before = [part.vertices.copy() for part in parts]
    for seed in range(20):
        bent = varied(parts, _generator(seed))
        points = np.concatenate([part.vertices for part in bent])
        assert np.linalg.norm(points, axis=1).max() == pytest.approx(0.5)
        assert points.min(axis=0) == pytest.approx(-points.max(axis=0))
        assert [len(part.faces) for part in bent] == [12, 1280]
    for part, points in zip(parts, before, strict=True):
        np.testing.assert_array_equal(part.vertices, points)


def test_draws_repeat_and_differ() -> None:
    parts = [trimesh.creation.icosphere(radius=0.5)]
    first, again, other = (varied(parts, _generator(seed))[0].vertices for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01


def test_without_a_twist_left_and_right_stay_alike() -> None:
    ball = trimesh.creation.icosphere(radius=0.5)
    mirrored = ball.copy()
    mirrored.vertices = ball.vertices * [-1.0, 1.0, 1.0]
    for seed in range(20):
        one, two = (varied([mesh], _generator(seed), Variation(twist=0.0))[0].vertices for mesh in (ball, mirrored))
        np.testing.assert_allclose(one * [-1.0, 1.0, 1.0], two, atol=1e-9)


def test_taper_twist_and_ripple_of_known_points() -> None:
    points = np.array([[1.0, 0.5, 0.0], [1.0, -0.5, 0.0], [0.0, 0.25, 0.0]])
    np.testing.assert_allclose(tapered(points, 0.5), [[1.5, 0.5, 0.0], [0.5, -0.5, 0.0], [0.0, 0.25, 0.0]])
    np.testing.assert_allclose(
        twisted(points, math.pi), [[0.0, 0.5, -1.0], [0.0, -0.5, 1.0], [0.0, 0.25, 0.0]], atol=1e-9
    )
    # Phases of a quarter turn make all waves 1 where their arguments are 0.
    moved = rippled(np.zeros((1, 3)), 0.1, 5.0, np.full(3, 0.25))
    np.testing.assert_allclose(moved, [[0.0, 0.1, 0.1]])
