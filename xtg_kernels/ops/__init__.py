"""The ops: one folder each, with a public function, a reference, a Triton kernel and the torch.library registration."""
