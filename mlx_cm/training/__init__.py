"""Training: from pictures and a model to a run folder that holds the trained model.

Everything random or scheduled is a function of the seed and the step, so a run that was interrupted goes on exactly.
"""
