"""Adapters on the frozen decoder: which modules get one, how they are attached, and the files other programs load."""
