"""
Ctrl-C, a scheduler's SIGTERM, a limit of minutes: a run ends after the step under way, and saves.
"""

import signal
import time


class Stop:
    """Whether the run is asked to stop. minutes: after which it stops by itself, 0: never.

    alone: no other ranks wait; a second Ctrl-C then ends the process at once, without saving.
    (torchrun itself asks twice.)"""

    def __init__(self, minutes, alone, began):
        self.signals = []  # names of those that came
        self.alone = alone
        self.end = began + 60 * minutes if minutes else None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._come)

    def _come(self, number, frame):
        if self.signals and self.alone:
            raise KeyboardInterrupt
        self.signals.append(signal.Signals(number).name)

    def late(self):
        return self.end is not None and time.perf_counter() > self.end

    def asked(self):
        return bool(self.signals) or self.late()

    def reason(self):
        if self.signals:
            return self.signals[0]
        return "max_minutes" if self.late() else "another rank"
