"""The losses of a step: what of the photograph is looked at, and when its samples are counted."""

import torch
from tiny_run import Reconstruction, tiny_config, write_inputs

from threedrec.distillation import Distillation
from threedrec.rendering.renderer import VolumeRenderer


def test_samples_are_counted_before_the_guidance_works_and_never_while_it_does(tmp_path, monkeypatch):
    run = Reconstruction(tiny_config(write_inputs(tmp_path)), tmp_path / "run", "cpu")._open()
    step, order = Distillation(run), []
    sample, guidance = VolumeRenderer.sample, step.guidance

    def counted(self, *args, **kwargs):
        order.append("samples")
        return sample(self, *args, **kwargs)

    def asked(*args, **kwargs):
        order.append("guidance")
        return guidance(*args, **kwargs)

    monkeypatch.setattr(VolumeRenderer, "sample", counted)
    step.guidance = asked
    step(0)
    assert order == ["samples", "samples", "guidance"]


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
