"""Pipelines: a model, its schedule and a sampler, from a request to pictures."""
