"""Audio files and signals: find, probe, decode, bring to one loudness. Float32 [2, S] at 48 kHz throughout; no torch."""
