"""Work that waits for arrivals: each kind in order, what is furthest first."""

from __future__ import annotations

from tensorlink.lanes import Lane, at_once, run_lanes


class Driver:
    """Waits by letting the next thing arrive."""

    def __init__(self, *arrivals):
        self.arrived, self.to_come = set(), list(arrivals)

    def wait_for(self, condition, what):
        while not condition():
            self.arrived.add(self.to_come.pop(0))


def test_each_lane_keeps_its_order_and_the_first_lane_goes_first():
    driver, log = Driver(1, 0, 2), []
    taking = Lane(lambda m: m in driver.arrived, lambda m: log.append(("take", m)))
    sending = Lane(at_once, lambda m: log.append(("send", m)))
    run_lanes(driver, 3, [taking, sending], "a test")
    assert log == [*(("send", m) for m in range(3)), *(("take", m) for m in range(3))]
    assert (taking.next, sending.next) == (3, 3)


def test_what_has_arrived_is_taken_before_more_is_sent():
    driver, log = Driver(), []

    def send(micro_batch):
        log.append(("send", micro_batch))
        driver.arrived.add(micro_batch - 1)  # the one before comes back

    taking = Lane(lambda m: m in driver.arrived, lambda m: log.append(("take", m)))
    driver.to_come.append(2)
    run_lanes(driver, 3, [taking, Lane(at_once, send)], "a test")
    assert log == [("send", 0), ("send", 1), ("take", 0), ("send", 2), ("take", 1), ("take", 2)]


def test_a_lane_may_hold_another_back():
    driver, log = Driver(0, 1, 2, 3), []
    taking = Lane(lambda m: m in driver.arrived, lambda m: log.append(-m))
    sending = Lane(lambda m: m - taking.next < 2, log.append)
    run_lanes(driver, 4, [taking, sending], "a test")
    assert log == [0, 1, 0, 2, -1, 3, -2, -3]
