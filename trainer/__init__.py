"""The algorithm and all that trains with it.

The rooms, each of which may import those above it:
    core        the mathematics, pure
    optim       theta's step
    engines     who holds theta, and where ranks meet
    config      the keys of a configuration
    runs        a run's folder
The files beside them, from a configuration to a trained run: `objective` turns keys into the terms of the mathematics, `setup`
makes the first state, `step` is one iteration of Algorithm 2, `captured` the same as CUDA graphs, `loop` trains, `evaluate`
measures, `learner` puts a run to use.
    tracking    ships a run's folder to MLflow
    studies     many runs: sweeps, reports
"""
