"""A user's script, for tests that send signals to it: python driver.py train|submit STORAGE NAME OPTIONS(JSON).

Prints "ready", waits for a line (or for the end of its input), starts the run, and prints what came out as JSON.
"""

from __future__ import annotations

import json
import sys

from tests.api.scripts.job import make_trainer

trainer = make_trainer(sys.argv[2], sys.argv[3], **json.loads(sys.argv[4]))
print("ready", flush=True)
sys.stdin.readline()
if sys.argv[1] == "submit":
    print(trainer.submit().name, flush=True)
    sys.stdin.readline()
else:
    result = trainer.train()
    print(json.dumps({"sha256": result.receipt.weights_sha256, "steps": result.receipt.steps}), flush=True)
