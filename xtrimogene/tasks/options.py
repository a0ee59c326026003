"""Choices and names of the tasks. It imports nothing: a command line answers at once."""

# What of a network an annotation trains.
TUNES = ("published", "all", "head")
# What predicted cell types are called in a result.
TYPE_COLUMN = "xtrimogene_celltype"
CONFIDENCE_COLUMN = "xtrimogene_celltype_confidence"
MAJORITY_COLUMN = "xtrimogene_celltype_majority"
PROBABILITIES_KEY = "X_xtrimogene_celltype_probabilities"
TYPES_KEY = "xtrimogene_celltype_names"
UNKNOWN = "unknown"
