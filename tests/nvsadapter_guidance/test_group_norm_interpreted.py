"""Triton kernels on the CPU: the tests of them in a process where Triton interprets."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton (part of the dev extra on Linux)")
def test_kernels_pass_their_tests_under_the_interpreter():
    # Triton decides at its import, and another test may have imported it.
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    files = [
        Path(__file__).with_name(name) for name in ("test_group_norm.py", "test_lean_kernels.py", "test_lean_block.py")
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", *map(str, files)]
    root = files[0].parent.parent.parent
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout
