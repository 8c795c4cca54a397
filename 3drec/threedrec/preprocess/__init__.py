"""From a file that a person has to a framed object on white: read, cut out, frame."""

from threedrec.preprocess.framing import Window, resample, silhouette_window, whole_window
from threedrec.preprocess.plain_background import decontaminate
from threedrec.preprocess.reading import check_shape, read_gray, read_rgba
from threedrec.preprocess.segmentation import METHODS, check_coverage, cut_out

__all__ = [
    "METHODS",
    "Window",
    "check_coverage",
    "check_shape",
    "cut_out",
    "decontaminate",
    "read_gray",
    "read_rgba",
    "resample",
    "silhouette_window",
    "whole_window",
]
