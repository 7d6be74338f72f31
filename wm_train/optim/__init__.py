"""Provide optimizers by name, learning-rate schedules and the average of weights."""
