"""The network: config, layers, inputs, folder on disk, FLOPs. Needs torch, numpy, safetensors and xtg_kernels."""
