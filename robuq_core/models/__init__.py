"""Networks: the plain DiT, its fake-quantised form for training, and its packed form for serving."""
