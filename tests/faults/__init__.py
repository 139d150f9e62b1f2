"""Faults for the workers of a real run: named by the test in FAULTS, put into the code as a worker starts.

    train(recipe, run, faults={"nan_loss": [[5, 1]]})

The package knows nothing of them: Python imports `sitecustomize` from this folder, which a test puts on PYTHONPATH.
"""

import json
import os
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def environment(**faults: Any) -> dict[str, str]:
    """What a command needs in its environment for its workers to have faults."""
    return {
        "FAULTS": json.dumps(faults),
        "PYTHONPATH": os.pathsep.join([str(FOLDER), str(FOLDER.parent.parent), os.environ.get("PYTHONPATH", "")]),
    }
