"""Training an adapter: set up a run, loop over its plan, keep its state."""
