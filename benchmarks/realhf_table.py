"""Four constants of `hardware.Calibration`, from measured seconds.

Least squares of relative errors by Gauss-Newton. Seconds are almost linear in the constants (the compute share taken
as its inverse), so few rounds do. A weak pull to the prior keeps constants in reason that the measurements hardly tell
apart, as launch and latency where all plans have the same tensor-parallel degree.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from training.planner.hardware import Calibration

Array = NDArray[np.float64]
Predict = Callable[[Calibration], list[float]]
"""Seconds of every measured run."""

PRIOR = Calibration(compute_share=0.6, launch_seconds=4e-4, collective_seconds=1.33e-4, controller_seconds=1.0)
"""What one would guess: matrix products at 60 % of the peak, twenty kernels a layer at 20 microseconds, two collectives
over 8 ranks as long as the launches, and a second for a call."""
PULL = 0.1
"""A constant twice the prior's weighs as much as one run predicted 10 % off."""
ROUNDS = 3
STEP = 1e-3
LEAST = 0.05
"""Of a constant, in priors: none becomes negative."""


def fit(predict: Predict, measured: list[float], prior: Calibration = PRIOR, pull: float = PULL) -> Calibration:
    """The constants with which `predict` comes nearest to `measured` seconds. No constant of `prior` may be 0."""
    seconds = np.array(measured)
    factors = np.ones(4)
    for _ in range(ROUNDS):
        now = np.array(predict(scaled(factors, prior)))
        slopes = [(np.array(predict(scaled(factors + STEP * one, prior))) - now) / STEP for one in np.eye(4)]
        jacobian = np.stack(slopes, axis=1)
        rows = np.concatenate([jacobian / seconds[:, None], pull * np.eye(4)])
        wanted = np.concatenate([(seconds - now + jacobian @ factors) / seconds, pull * np.ones(4)])
        factors = np.maximum(np.linalg.lstsq(rows, wanted, rcond=None)[0], LEAST)
    return scaled(factors, prior)


def scaled(factors: Array, prior: Calibration) -> Calibration:
    """`prior` with its constants multiplied; the first factor divides the compute share."""
    slowness, launch, collective, controller = map(float, factors)
    return replace(
        prior,
        compute_share=prior.compute_share / slowness,
        launch_seconds=prior.launch_seconds * launch,
        collective_seconds=prior.collective_seconds * collective,
        controller_seconds=prior.controller_seconds * controller,
    )
