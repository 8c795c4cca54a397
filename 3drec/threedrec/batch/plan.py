"""What is left to do: the images that were found, against what the manifest says of them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from threedrec.batch.folders import result_folders
from threedrec.batch.inputs import Input, Inputs
from threedrec.batch.manifest import DONE, Line, Manifest
from threedrec.batch.task import Task

if TYPE_CHECKING:
    from threedrec.config_schema import ExperimentConfig

FINAL = ("input", "diverged")
"""Kinds of failure that the same image and config will meet again."""


@dataclass
class Plan:
    """What becomes of every image."""

    tasks: list[Task] = field(default_factory=list)
    copies: dict[str, list[Task]] = field(default_factory=dict)
    """Images with the same content as another one, by the name of that one."""
    finished: list[str] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    """Failed before, and not tried again."""
    broken: list[Input] = field(default_factory=list)
    """Cannot even be tried."""
    changed: list[str] = field(default_factory=list)
    """To do because the image or the config is not what it was."""
    gone: list[str] = field(default_factory=list)
    """In the manifest, but no longer among the images."""


@dataclass
class Settings:
    """What all tasks share."""

    output: Path
    config: str
    fingerprint: str
    max_retries: int
    retry_failed: bool


def make_plan(inputs: Inputs, hashes: Mapping[str, str | None], manifest: Manifest, settings: Settings) -> Plan:
    """Compare the images with the manifest."""
    names = [image.name for image in inputs.images]
    before = {name: line.output for name, line in manifest.last.items() if line.output}
    folders = result_folders(names, before)
    plan = Plan(gone=sorted(set(manifest.last) - set(names)))
    leaders = _leaders(inputs, hashes, manifest, settings)
    todo: set[str] = set()
    for image in inputs.images:
        content, last = hashes[image.name], manifest.last.get(image.name)
        if image.problem:
            plan.broken.append(image)
            continue
        state = state_of(last, content, manifest, settings)
        if state == "finished":
            plan.finished.append(image.name)
            continue
        if state == "given up" and not (last is not None and last.copy_of in todo):
            plan.given_up.append(image.name)
            continue
        if last is not None and not last.of(content, settings.fingerprint):
            plan.changed.append(image.name)
        task = _task(image, content, folders[image.name], manifest, settings)
        todo.add(image.name)
        leader = leaders.get(content or "", image.name)
        if leader == image.name:
            plan.tasks.append(task)
        else:
            plan.copies.setdefault(leader, []).append(task)
    return plan


def state_of(last: Line | None, content: str | None, manifest: Manifest, settings: Settings) -> str:
    """Return ``finished``, ``given up`` or ``to do``."""
    if last is None or not last.of(content, settings.fingerprint):
        return "to do"
    if last.status == DONE:
        return "finished" if (settings.output / last.output).is_dir() else "to do"
    tries = manifest.attempts(last.input, content, settings.fingerprint)
    spent = last.kind in FINAL or tries > settings.max_retries or bool(last.copy_of)
    return "given up" if spent and not settings.retry_failed else "to do"


def fingerprint(config: "ExperimentConfig") -> str:
    """Return a short hash of all config values but those of one image or one place."""
    values = asdict(config)
    for key in ("tag", "timestamp", "use_timestamp", "trial_dir", "resume", "exp_root_dir", "resolved", "description"):
        values.pop(key)
    values["data"].pop("image_path", None)
    values["trainer"].pop("enable_progress_bar")
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _leaders(
    inputs: Inputs, hashes: Mapping[str, str | None], manifest: Manifest, settings: Settings
) -> dict[str, str]:
    """Return, for each content, the image that is reconstructed: a finished one, otherwise the first by name."""
    leaders: dict[str, str] = {}
    finished: set[str] = set()
    for image in inputs.images:
        content = hashes[image.name]
        if content is None or image.problem:
            continue
        done = state_of(manifest.last.get(image.name), content, manifest, settings) == "finished"
        if content not in leaders or (done and content not in finished):
            leaders[content] = image.name
        if done:
            finished.add(content)
    return leaders


def _task(image: Input, content: str | None, folder: str, manifest: Manifest, settings: Settings) -> Task:
    failures = manifest.attempts(image.name, content, settings.fingerprint)
    last = manifest.last.get(image.name)
    return Task(
        input=image.name,
        image=image.path,
        hash=content,
        folder=str(settings.output / folder),
        config=settings.config,
        fingerprint=settings.fingerprint,
        attempt=failures + 1,
        afresh=last is not None and starts_afresh(last.kind),
    )


def starts_afresh(kind: str) -> bool:
    """Whether a retry after a failure of this kind begins anew: an error may have come from what lay in the folder."""
    return kind in ("error", *FINAL)
