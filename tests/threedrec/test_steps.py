"""The losses of a step: what of the photograph is looked at, and when its samples are counted."""

from contextlib import contextmanager

import torch
from tiny_run import Reconstruction, tiny_config, write_inputs

from threedrec.beside import Beside
from threedrec.distillation import Distillation
from threedrec.rendering.renderer import VolumeRenderer


def test_the_host_waits_for_samples_before_the_guidance_works_or_beside_it(tmp_path, monkeypatch):
    run = Reconstruction(tiny_config(write_inputs(tmp_path)), tmp_path / "run", "cpu")._open()
    step, order = Distillation(run), []
    sample, guidance = VolumeRenderer.sample, step.guidance

    def counted(self, *args, **kwargs):
        order.append("samples")
        return sample(self, *args, **kwargs)

    def asked(*args, **kwargs):
        order.append("guidance")
        return guidance(*args, **kwargs)

    class Listened(Beside):
        def mark(self):
            order.append("mark")

        @contextmanager
        def __call__(self):
            order.append("beside")
            yield
            order.append("together")

    monkeypatch.setattr(VolumeRenderer, "sample", counted)
    step.guidance, step._beside = asked, Listened(torch.device("cpu"))
    step(0)
    assert order == ["mark", "samples", "guidance", "beside", "samples", "together"]


def test_views_drawn_ahead_are_those_of_their_step(tmp_path):
    run = Reconstruction(tiny_config(write_inputs(tmp_path)), tmp_path / "run", "cpu")._open()
    ahead, resumed = Distillation(run), Distillation(run)
    ahead(0)
    assert ahead._ahead is not None and ahead._ahead[0] == 1 and resumed._ahead is None
    (cameras, rays), (expected, expected_rays) = ahead._views(1), resumed._views(1)
    assert torch.equal(cameras.c2w, expected.c2w) and torch.equal(rays[1], expected_rays[1])
    assert torch.equal(cameras.light_positions, expected.light_positions)
    assert not torch.equal(cameras.c2w, ahead._views(2)[0].c2w)


def test_the_photograph_gives_the_same_losses_whether_its_samples_were_counted_before(tmp_path):
    run = Reconstruction(tiny_config(write_inputs(tmp_path)), tmp_path / "run", "cpu")._open()
    supervision, support = Distillation(run).supervision, run.support.resized(16, 16)
    supervision.ref_rays = 64
    first, second = (torch.Generator().manual_seed(1) for _ in range(2))
    at_once = supervision.reference(support, 0, first)
    sight = supervision.sight(support, second)
    assert sight.rays_o.shape == (1, 8, 8, 3)
    later = supervision.reference(support, 0, second, sight)
    assert at_once.terms.keys() == later.terms.keys() >= {"ref_rgb", "ref_mask"}
    torch.testing.assert_close(torch.stack(list(later.terms.values())), torch.stack(list(at_once.terms.values())))
