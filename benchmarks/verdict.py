"""Whether a figure was reached. A ratio that varies too much from round to round says neither yes nor no."""

MOST_SPREAD = 0.1  # of a ratio that can be judged


def spread(quartiles):
    """How much a value varies over the rounds: its interquartile range over its median."""
    return (quartiles["q3"] - quartiles["q1"]) / quartiles["median"]


def too_noisy(ratio):
    """Whether a ratio (quartiles) varies too much to be judged."""
    return not spread(ratio) <= MOST_SPREAD  # `not <=` also catches a NaN


def met(ratio, most):
    """Whether the median of a ratio (quartiles) is at most `most`. None if there is no `most`, or if the ratio is too noisy."""
    return None if most is None or too_noisy(ratio) else ratio["median"] <= most
