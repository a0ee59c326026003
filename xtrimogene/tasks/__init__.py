"""Tasks: what embeddings are for, a file each, over what they share: splits, fits, folders and reports."""
