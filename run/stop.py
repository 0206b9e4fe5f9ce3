"""
Ctrl-C, a scheduler's signal, a closed terminal, a limit of minutes: a run ends after the step under
way, and saves.
"""

import signal
import time


# a scheduler sends TERM, or USR1 some time before; a terminal that closes, or ssh's end, HUP
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


class Stop:
    """Whether the run is asked to stop. minutes: after which it stops by itself, 0: never.

    alone: no other ranks wait; a second Ctrl-C then ends the process at once, without saving.
    (torchrun itself asks twice.)"""

    def __init__(self, minutes, alone, began):
        self.signals = []  # names of those that came
        self.alone = alone
        self.end = began + 60 * minutes if minutes else None
        for name in SIGNALS:
            number = getattr(signal, name, None)
            if number is None:  # Windows lacks two
                continue
            if name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup asks for it
            signal.signal(number, self._come)

    def _come(self, number, frame):
        name = signal.Signals(number).name
        if name == "SIGINT" and name in self.signals and self.alone:
            raise KeyboardInterrupt
        self.signals.append(name)

    def late(self):
        return self.end is not None and time.perf_counter() > self.end

    def asked(self):
        return bool(self.signals) or self.late()

    def reason(self):
        if self.signals:
            return self.signals[0]
        return "max_minutes" if self.late() else "another rank"
