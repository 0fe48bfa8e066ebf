"""The mathematics of flow matching: timestep laws, the velocity loss, guidance, the sampler (spec, section 4)."""
