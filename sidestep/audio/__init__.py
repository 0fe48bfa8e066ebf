"""Audio files and signals: float32 [2, S] at 48 kHz throughout; no torch."""
