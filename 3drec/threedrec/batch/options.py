"""What a batch is asked to do."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from threedrec.errors import InputError

LOCAL, RAY = "local", "ray"
RECONSTRUCT = "threedrec.batch.task:reconstruct"

_OWN_KEYS = {
    "data.image_path": "name the images before the options",
    "trial_dir": "-o names the folder",
    "exp_root_dir": "-o names the folder",
    "resume": "use --resume",
    "tag": "every image has a folder of its own name",
}


@dataclass
class BatchOptions:
    """One batch; the defaults are those of the command line."""

    images: Sequence[str]
    """Folders (searched through), files, and patterns."""
    output: str | Path
    config: str = "configs/nvsadapter.yaml"
    overrides: Sequence[str] = ()
    """``dotted.key=value``, as typed."""
    gpu: str = "auto"
    """Devices of the local engine's workers: auto, cpu, or ids of GPUs such as ``0,1``, each of which gets workers."""
    engine: str = LOCAL
    address: str | None = None
    """Of a Ray cluster; None starts one on this machine."""
    gpus_per_task: float | None = None
    """Share of a GPU for each worker: 0.5 puts two on each. None for 1; on a Ray cluster without GPUs for 0."""
    workers: int | None = None
    """Ray workers; None for as many as the cluster has room for."""
    max_retries: int = 2
    timeout: float = 7200.0
    """Seconds for one attempt at one image; 0 for no limit."""
    memory_gb: float | None = None
    """Memory of a worker: Ray places workers by it, the local engine gives up a task beyond it; None for no limit."""
    overlap: bool | None = None
    """Finish images in one more process a device of the local engine; None for doing so on a GPU with one worker."""
    resume: bool = False
    retry_failed: bool = False
    """With ``resume``: try again what has failed for good."""
    dry_run: bool = False
    function: str = RECONSTRUCT
    """What is done with each task, as ``module:function``; for other work on the same machinery."""

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            InputError: names the option.
        """
        if not self.images:
            raise InputError("IMAGES: give a folder, files, or a quoted pattern")
        if not str(self.output):
            raise InputError("-o: give the folder for the results")
        if self.engine not in (LOCAL, RAY):
            raise InputError(f"--engine {self.engine}: expected local or ray")
        for option, given in (("--address", self.address), ("--workers", self.workers)):
            if given is not None and self.engine != RAY:
                raise InputError(f"{option}: is of the engine for many workers; add --engine ray")
        if self.retry_failed and not self.resume:
            raise InputError("--retry-failed: is about a batch that has been begun; add --resume")
        self._check_numbers()
        for text in self.overrides:
            key = text.partition("=")[0]
            if key in _OWN_KEYS:
                raise InputError(f"{key}: is set for every image by the batch; {_OWN_KEYS[key]}")

    def _check_numbers(self) -> None:
        if self.max_retries < 0:
            raise InputError(f"--max-retries {self.max_retries}: expected 0 or more")
        if self.workers is not None and self.workers < 1:
            raise InputError(f"--workers {self.workers}: expected 1 or more")
        if not 0 <= self.timeout < math.inf:
            raise InputError(f"--timeout {self.timeout:g}: expected seconds, or 0 for no limit")
        if self.memory_gb is not None and not 0 < self.memory_gb < math.inf:
            raise InputError(f"--memory {self.memory_gb:g}: expected GB above 0")
        share = self.gpus_per_task
        if share is not None and self.engine != RAY and not 0 < share <= 1:
            raise InputError(
                f"--gpus-per-task {share:g}: expected 1 or a share such as 0.5; one image uses one GPU, --gpu cpu none"
            )
        if share is not None and not (0 <= share <= 1 or (share < math.inf and share == int(share))):
            raise InputError(
                f"--gpus-per-task {share:g}: expected a share such as 0.25, or whole GPUs, or 0 for the CPU"
            )
