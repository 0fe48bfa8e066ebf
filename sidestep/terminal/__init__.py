"""What a person sees: the terminal as an object that is passed in, and events as lines or as a live view."""
