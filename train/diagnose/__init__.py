"""Whether activations are what the quantiser takes them for: their shape, layer by layer, before and after rotation."""
