"""Side-Step: train adapters for ACE-Step 1.5. `uv run train.py` starts the wizard, `uv run train.py --help` lists the commands."""

import sys

from sidestep.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
