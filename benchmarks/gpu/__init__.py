"""The day a GPU is there: python -m benchmarks.gpu --help"""
