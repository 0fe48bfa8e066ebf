"""One process of several that train together; started by torchrun, or with RANK and WORLD_SIZE set."""

import dataclasses
import json
import sys
from pathlib import Path

from sidestep.events import as_json
from sidestep.tasks.train.setup import train
from tests.training_world import settings

if __name__ == "__main__":
    data, output, changes = sys.argv[1:]
    config = settings(Path(data), Path(output), **json.loads(changes))
    paths = {
        name: Path(path) for name in ("checkpoint_dir", "resume_from", "prior_data") if (path := getattr(config, name))
    }
    config = dataclasses.replace(config, **paths)
    train(config, lambda event: print(as_json(event), flush=True))
