"""`python -m tests.cluster [ARGUMENTS OF pytest]`: the tests, or one line that says why not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.cluster.hosts import REQUIRED, NotAllowed, cluster

if __name__ == "__main__":
    try:
        with cluster(1):
            pass
    except NotAllowed as error:
        print(f"cluster-test: ran nothing: {error}")
        sys.exit()
    os.environ[REQUIRED] = "1"
    folder = str(Path(__file__).parent)
    sys.exit(pytest.main(["-q", "-m", "cluster", folder, *sys.argv[1:]]))
