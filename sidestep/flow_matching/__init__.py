"""The training mathematics: timestep laws, the velocity loss, condition dropout (spec, section 4)."""
