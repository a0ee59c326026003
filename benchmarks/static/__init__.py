"""What can be said of the Triton kernels without a GPU: compiled code, a model of its time, launch configs."""
