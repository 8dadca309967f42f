"""Name tables: which tensor of a published checkpoint is which parameter of a model."""
