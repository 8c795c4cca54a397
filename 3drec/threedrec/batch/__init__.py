"""Many images: one task and one folder each, a manifest that is the truth, on one machine or a Ray cluster."""

from threedrec.batch.batch import BatchReport, run_batch
from threedrec.batch.manifest import Line, Manifest
from threedrec.batch.options import BatchOptions
from threedrec.batch.task import Outcome, Task, reconstruct

__all__ = ["BatchOptions", "BatchReport", "Line", "Manifest", "Outcome", "Task", "reconstruct", "run_batch"]
