"""A driver that submits an elastic run, held at a place, and waits to be killed."""

from __future__ import annotations

import sys
import time

from lepton_ray import Elastic
from tests.faults.scene import LIMIT_S, Happening, scene, wait_for

if __name__ == "__main__":
    storage, where = sys.argv[1:]
    hold = Happening(lambda: wait_for(f"{storage}.gate"), where, 0, 8, f"{storage}.happened")
    scene(storage, "job", hold, num_workers=Elastic(min=1, max=2))
    time.sleep(LIMIT_S)
