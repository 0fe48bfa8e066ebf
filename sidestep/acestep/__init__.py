"""ACE-Step 1.5 itself: its files, its conditions, its audio codec, and the device it runs on."""
