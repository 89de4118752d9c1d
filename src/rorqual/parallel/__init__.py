"""How chips share the work: mesh, experts, pipeline, data, balance."""
