"""A roofline on paper of every op and of the 100m encoder: python -m benchmarks.roofline"""
