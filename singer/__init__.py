"""A thin training layer on timm: distil a Vision Transformer with SiNGER."""
