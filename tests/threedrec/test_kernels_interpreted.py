"""Triton kernels on the CPU: the tests of them in a process where Triton interprets."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton (part of the dev extra on Linux)")
@pytest.mark.parametrize(
    ("name", "skipped"),
    [
        # The released size is too large for the interpreter.
        ("test_hashgrid_triton.py", ["1 skipped"]),
        ("test_mlp_triton.py", []),
        ("test_packed_triton.py", []),
    ],
)
def test_kernels_pass_their_tests_under_the_interpreter(name, skipped, repository):
    # Triton decides at its import, and another test may have imported it.
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(name))]
    result = subprocess.run(command, env=environment, cwd=repository, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and re.findall(r"\d+ skipped", result.stdout) == skipped
