"""`xtrimogene bench`: FLOPs, time and memory against dense and padded Transformers. See bench.py."""
