import math

import pytest

from retnet.studies.slopes import Slope, expected, slope

LENGTHS = (4096, 8192, 16384, 32768, 65536)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_a_power_law_has_its_exponent_and_no_doubt(power):
    found = slope(LENGTHS, [3.7e-6 * n**power for n in LENGTHS])
    assert found == pytest.approx((power, power, power), abs=1e-9)


def test_the_interval_is_students():
    """Against scipy's regression, on timings that scatter."""
    from scipy.stats import linregress, t

    y = [1.0, 2.3, 3.6, 8.9, 15.1]
    reference = linregress([math.log(n) for n in LENGTHS], [math.log(v) for v in y])
    found, reach = slope(LENGTHS, y), t.ppf(0.975, 3) * reference.stderr
    assert found == pytest.approx((reference.slope, reference.slope - reach, reference.slope + reach))


def test_a_constant_part_is_seen_as_doubt():
    """a + b·N bends in log-log: the exponent falls below 1, and the interval does not pretend to know it."""
    bent = slope(LENGTHS, [8192 + n for n in LENGTHS])
    assert bent.value < 0.9
    assert bent.high - bent.low > 0.2
    assert not bent.within(0.15, 1.0)


def test_orders_of_growth():
    assert [expected(order, LENGTHS) for order in ("1", "N", "N²")] == pytest.approx([0, 1, 2])
    assert 1.05 < expected("N log N", LENGTHS) < 1.15


def test_an_exponent_reads_well():
    assert str(Slope(0.974, 0.93, 1.0149)) == "0.97 (0.93..1.01)"
    assert str(Slope(-0.001, -0.2, 0.1)) == "0.00 (−0.20..0.10)"


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [((1, 2), (1, 2), "3 different"), ((1, 1, 2), (1, 2, 3), "3 different"), ((1, 2, 3), (1, 0, 2), "zero")],
)
def test_what_has_no_slope(x, y, says):
    with pytest.raises(ValueError, match=says):
        slope(x, y)
