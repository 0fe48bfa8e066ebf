"""The 5 Hz language model beside the DiT: it plans a song, writes its codes, and describes a song from its codes."""
