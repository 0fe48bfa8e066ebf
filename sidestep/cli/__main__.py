"""`python -m sidestep.cli`: the command line, for processes that this program starts itself."""

import sys

from sidestep.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
