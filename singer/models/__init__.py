"""Teachers and students: backbones, nullspace bases, layer matching."""
