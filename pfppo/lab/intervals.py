"""Student's t, for intervals over few runs: a percentile bootstrap of five values covers the mean
84 times in 100 instead of 95, of three 76.

Not covered: unequal weights, several contrasts at once (a confidence for each is the caller's).
"""

import functools
import math

import numpy as np


def t_inside(t, df):
    """P(|T| < t) of Student's t with df = 1, 2, ... degrees of freedom, exactly: with
    a = atan(t / sqrt df) a finite sum in cos a (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle, odd = math.atan(t / df**0.5), df % 2
    term, total = math.cos(angle) ** odd, 0.0
    for power in range(odd, df - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


@functools.cache
def t_quantile(confidence, df):
    """The t with P(|T| < t) = confidence, by halving."""
    low, high = 0.0, 1.0
    while t_inside(high, df) < confidence:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_inside(middle, df) < confidence else (low, middle)
    return high


def t_interval(values, confidence=0.95):
    """(mean, low, high) of the mean of independent values; without an interval None of one value,
    and without a mean where a value is None."""
    if None in values:
        return None, None, None
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, None, None
    half = t_quantile(confidence, count - 1) * float(np.std(values, ddof=1)) / count**0.5
    return mean, mean - half, mean + half
