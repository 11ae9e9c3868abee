"""Networks: the plain DiT of the paper, its fake-quantised form for training, and its packed form for serving."""
