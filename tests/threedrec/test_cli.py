import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from threedrec import cli, registry
from threedrec.config import load_config
from threedrec.divergence import DivergenceError
from threedrec.errors import InputError
from threedrec.reconstruct import Reconstruction

MODES = ("train", "validate", "test", "export")


class Recording:
    """A system that notes what it is asked for, and fails as told by ``failure``."""

    Config = Reconstruction.Config
    calls: list[tuple] = []
    failure: BaseException | None = None

    def __init__(self, config, run_dir, device, host=None):
        self.config, self.run_dir, self.device = config, run_dir, device

    def __getattr__(self, name):
        def note():
            Recording.calls.append((name, self.config, self.run_dir, self.device))
            if Recording.failure is not None:
                raise Recording.failure

        if name not in MODES:
            raise AttributeError(name)
        return note


@pytest.fixture(autouse=True)
def _recording(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {("system", "nvsadapter-system"): Recording})
    monkeypatch.setattr(Recording, "calls", [])
    monkeypatch.setattr(Recording, "failure", None)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "my chair.png"
    Image.new("RGBA", (32, 32), "red").save(path)
    return path


@pytest.fixture
def launch(image, tmp_path, capsys):
    """Run launch.py in this process; returns exit code and what stderr ends with."""

    def run(*arguments, config="configs/nvsadapter.yaml", mode="--train"):
        paths = (f"data.image_path={image}", f"exp_root_dir={tmp_path / 'outputs'}", "system.guidance.pretrained=mini")
        command = ["--config", config, mode, "--gpu", "cpu", *paths, *arguments]
        try:
            code = cli.launch_main(command)
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err.strip().splitlines()[-1:]

    return run


def one_call():
    (call,) = Recording.calls
    return call


def test_train_writes_the_resolved_config_and_the_command(launch, tmp_path):
    assert launch("trainer.max_steps=3")[0] == 0
    name, config, run_dir, device = one_call()
    assert name == "train" and device.type == "cpu" and config.recipe == "mini-cpu"
    assert run_dir.parent == tmp_path / "outputs" / "nvsadapter" and run_dir.name.startswith("my_chair@2")
    assert load_config(run_dir / "configs" / "parsed.yaml").trainer.max_steps == 3
    assert (run_dir / "cmd.txt").read_text().count("\n") == 1


def test_a_resumed_run_says_what_has_changed(launch, caplog, monkeypatch):
    assert launch("trainer.max_steps=3")[0] == 0
    run_dir = one_call()[2]
    (run_dir / "ckpts").mkdir()
    (run_dir / "ckpts" / "last.ckpt").write_bytes(b"x")
    said = []
    monkeypatch.setattr("threedrec.launch.logger.warning", lambda text, *values: said.append(text % values))
    assert launch("trainer.max_steps=3", "resume=auto")[0] == 0 and not said
    assert launch("trainer.max_steps=4", "seed=2", "resume=auto")[0] == 0
    assert said == ["not as when the run began: seed, trainer.max_steps"]
    assert (run_dir / "cmd.txt").read_text().count("\n") == 3


def test_the_dumped_config_of_any_run_can_be_repeated(launch):
    assert launch("trainer.max_steps=3")[0] == 0
    run_dir = one_call()[2]
    (run_dir / "ckpts").mkdir()
    (run_dir / "ckpts" / "last.ckpt").write_bytes(b"x")
    parsed = str(run_dir / "configs" / "parsed.yaml")
    assert launch("trainer.max_steps=3", "resume=auto")[0] == 0
    assert launch(config=parsed)[0] == 0
    again = Recording.calls[-1]
    assert again[2] != run_dir and again[1].resume is None and again[1].trainer.max_steps == 3


@pytest.mark.parametrize("mode", MODES)
def test_the_dumped_config_leads_to_its_run(image, tmp_path, mode):
    output = tmp_path / "out"
    assert cli.main(["run", str(image), "-o", str(output), "--gpu", "cpu", "--recipe", "mini-cpu"]) == 0
    (output / "ckpts").mkdir()
    (output / "ckpts" / "last.ckpt").write_bytes(b"x")
    parsed = str(output / "configs" / "parsed.yaml")
    auto = ["resume=auto"] if mode == "train" else []
    assert cli.launch_main(["--config", parsed, f"--{mode}", "--gpu", "cpu", *auto]) == 0
    assert Recording.calls[-1][2] == output and Recording.calls[-1][1].resume == str(output / "ckpts" / "last.ckpt")


def test_a_run_killed_before_its_first_checkpoint_begins_again(image, tmp_path):
    arguments = ["run", str(image), "-o", str(tmp_path / "out"), "--gpu", "cpu", "--recipe", "mini-cpu"]
    assert cli.main(arguments) == 0
    assert cli.main([*arguments, "resume=auto"]) == 0
    assert Recording.calls[-1][1].resume is None and Recording.calls[-1][2] == tmp_path / "out"


def test_a_script_is_repeated_through_python(launch, monkeypatch):
    monkeypatch.setattr(Recording, "failure", KeyboardInterrupt())
    monkeypatch.setattr("sys.argv", ["launch.py", "--train", "resume=old.ckpt", "tag=a b"])
    code, (line,) = launch()
    assert code == 130 and line.endswith("go on with: python launch.py --train 'tag=a b' resume=auto")
    assert (one_call()[2] / "cmd.txt").read_text() == "python launch.py --train resume=old.ckpt 'tag=a b'\n"
    monkeypatch.setattr("sys.argv", ["/usr/bin/3drec", "run"])
    assert launch()[1][0].endswith("go on with: /usr/bin/3drec run resume=auto")


@pytest.mark.parametrize("mode", MODES[1:])
def test_other_modes_go_on_from_the_newest_run(launch, mode):
    assert launch()[0] == 0
    run_dir = one_call()[2]
    assert launch(mode=f"--{mode}")[0] == 2
    (run_dir / "ckpts").mkdir()
    (run_dir / "ckpts" / "last.ckpt").write_bytes(b"x")
    assert launch(mode=f"--{mode}")[0] == 0
    assert Recording.calls[-1][0] == mode and Recording.calls[-1][2] == run_dir


def test_options_and_overrides_mix(image, tmp_path):
    code = cli.launch_main(
        ["seed=4", "--train", f"data.image_path={image}", "--gpu", "cpu", f"exp_root_dir={tmp_path}"]
        + ["--config", "configs/nvsadapter.yaml", "recipe=mini-cpu"]
    )
    assert code == 0 and one_call()[1].seed == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data.image_pth=a.png"], "data.image_pth: unknown key, did you mean 'data.image_path'?"),
        (["trainer.max_steps=x"], "trainer.max_steps: expected a whole number"),
        (["data.image_path=no/such.png"], "data.image_path: no/such.png: no such file"),
        (["data.image_path="], "data.image_path"),
        ([f"data.image_path={'x' * 300}.png"], "x.png: no such file"),
        ([f"trial_dir={'x' * 300}"], "the name is too long"),
        (["data.image_path=/tmp"], "data.image_path: /tmp: is a folder"),
        (["system.guidance_type=sd"], "system.guidance_type: unknown guidance 'sd'"),
        (["resume=no/such.ckpt"], "resume: no/such.ckpt: no such checkpoint"),
        (["recipe=big"], "recipe: unknown recipe 'big'"),
        (["exp_root_dir=/dev/null/here"], "/dev/null/here/nvsadapter"),
        (["--gpu", "x"], "--gpu x: expected auto, cpu, or ids"),
        (["--trian"], "unknown option --trian, did you mean '--train'?"),
        (["--gpus=0"], "unknown option --gpus=0, did you mean '--gpu'?"),
        (["oops"], "'oops' is no key=value"),
        (["--test"], "not allowed with argument"),
    ],
)
def test_mistakes_end_in_one_line_and_2(launch, arguments, words):
    code, (line,) = launch(*arguments)
    assert code == 2
    assert line.startswith("error: ") and words in line
    assert not Recording.calls


def test_missing_config(launch):
    code, (line,) = launch(config="configs/nvsadaptor.yaml")
    assert code == 2 and line.startswith("error: configs/nvsadaptor.yaml: no such config file")


def test_missing_options(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.launch_main(["--train"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: the following arguments are required: --config")


@pytest.mark.parametrize(
    ("failure", "code", "words"),
    [
        (InputError("photo.png: no foreground"), 2, "error: photo.png: no foreground"),
        (DivergenceError("stage fine, step 3: the loss is not finite"), 2, "error: stage fine, step 3: the loss"),
        (KeyboardInterrupt(), 130, "resume=auto"),
        (RuntimeError("surprise"), 1, "fault of the program"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x.png"), 2, "error: /data/x.png: No space left"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "my_chair@"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), 2, "error: out of GPU memory: lower data.random_camera"),
        (ModuleNotFoundError("No module named 'xatlas'", name="xatlas"), 2, "'xatlas' is not installed"),
    ],
)
def test_every_ending_has_its_code(launch, monkeypatch, failure, code, words):
    monkeypatch.setattr(Recording, "failure", failure)
    found, (line,) = launch()
    assert found == code and words in line


def test_debug_shows_the_traceback(image, capsys):
    arguments = ["--config", "no.yaml", "--train", f"data.image_path={image}"]
    assert cli.launch_main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert cli.launch_main([*arguments, "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("error: no.yaml")


def test_run_is_the_same_job_in_a_named_folder(image, tmp_path):
    output = tmp_path / "out"
    arguments = ["run", str(image), "-o", str(output), "--gpu", "cpu", "--seed", "5", "--recipe", "mini-cpu"]
    assert cli.main([*arguments, "trainer.max_steps=2"]) == 0
    name, config, run_dir, _ = one_call()
    assert (name, run_dir, config.seed, config.recipe) == ("train", output, 5, "mini-cpu")
    assert config.trainer.max_steps == 2 and Path(config.data.image_path) == image
    # A second run must not mix its files with the first one's.
    assert cli.main(arguments) == 2
    (output / "ckpts").mkdir()
    (output / "ckpts" / "last.ckpt").write_bytes(b"x")
    assert cli.main([*arguments, "resume=auto"]) == 0
    assert Recording.calls[-1][1].resume == str(output / "ckpts" / "last.ckpt")


def test_launch_is_a_subcommand_too(image, tmp_path):
    arguments = ["launch", "--config", "configs/nvsadapter.yaml", "--train", "--gpu", "cpu", "recipe=mini-cpu"]
    assert cli.main([*arguments, f"data.image_path={image}", f"exp_root_dir={tmp_path}"]) == 0


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["rnu", "a.png"])
    assert stop.value.code == 2
    assert "invalid choice: 'rnu'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "code",
    [
        "import sys, threedrec.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass",
        "import sys, threedrec.cli as c\ntry: c.launch_main(['--help'])\nexcept SystemExit: pass",
        "import sys, threedrec, nvsadapter_guidance",
    ],
)
def test_help_and_import_load_nothing_heavy(code):
    heavy = "('torch', 'tinycudann', 'nerfacc', 'triton', 'diffusers', 'transformers', 'omegaconf', 'lightning')"
    code += f"\nprint('LOADED', [name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "LOADED []", done.stderr


@pytest.mark.parametrize("folder", [".", "3drec"])
def test_launch_script_from_both_folders(repository, folder):
    command = [sys.executable, "launch.py", "--config", "configs/nvsadapter.yaml", "--train", "trainer.max_steps=x"]
    done = subprocess.run(command, cwd=repository / folder, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == ("error: command line: trainer.max_steps: expected a whole number, got 'x'")
