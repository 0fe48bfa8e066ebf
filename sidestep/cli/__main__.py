"""`python -m sidestep.cli`: the command line, for processes that this program starts itself."""

from sidestep.cli.start import entry

if __name__ == "__main__":
    entry()
