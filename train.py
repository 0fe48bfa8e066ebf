"""Side-Step: train adapters for ACE-Step 1.5. `uv run train.py` is the wizard, with `--help` the commands."""

from sidestep.cli.start import entry

if __name__ == "__main__":
    entry()
