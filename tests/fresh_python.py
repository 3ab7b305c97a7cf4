"""Code that needs an interpreter of its own: what it imports first, and under which environment."""

import os
import subprocess
import sys


def run_python(code, **environment):
    """What ``code`` prints in a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=os.environ | environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
