"""Side-Step: train LoRA and LoKr adapters for ACE-Step 1.5."""

__version__ = "0.2.0"
