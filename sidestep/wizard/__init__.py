"""The wizard: it asks, shows and returns a config. It runs nothing and imports no torch."""
