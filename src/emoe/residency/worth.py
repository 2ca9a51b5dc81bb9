"""Whether loading ahead pays: seconds saved against seconds lost, judged over windows. Pure, and without a clock.

A prefetch on a saturated link makes things slower, and so does a predictor that takes longer than what it saves. Both
report here; what loses is switched off, and tried again ever more rarely.
"""

from __future__ import annotations

WINDOW_PASSES = 32
"""Forward passes between two judgements."""

MARGIN = 1.1
"""What is on must lose by a tenth to be switched off, what is off must win by a tenth to stay on: no flapping."""

LEAST_LOSS_S, LEAST_LOSS_SHARE = 1e-3, 0.01
"""A window that loses less than a millisecond, or than a hundredth of its time, is noise."""

FIRST_REST, LONGEST_REST = 8, 128
"""Windows that pass before something switched off is tried again; each trial that fails doubles them."""


class Worth:
    """The account of one way of loading ahead.

    Attributes:
        active: whether to load ahead now.
        usable: False once it has broken down.
        judging: False only measures and never switches off, for experiments about quality.
        reason: why it is off, or on again; empty while it has been on from the start.
        hidden_s: load time that nothing waited for, thanks to prefetches that were used.
        delayed_s: what demand loads waited longer because of prefetches, and reloads of what useless ones evicted.
        overhead_s: predictor and prefetcher seconds on the critical path.
    """

    def __init__(self) -> None:
        """Start active, with nothing measured."""
        self.active = self.usable = self.judging = True
        self.reason = ""
        self.hidden_s = self.delayed_s = self.overhead_s = 0.0
        self._saved = self._lost = 0.0  # halved at every window: recent windows count most
        self._passes = 0
        self._seconds = 0.0
        self._windows_left = 0
        self._rest = FIRST_REST
        self._trial = False
        self._blind = False

    def hide(self, seconds: float) -> None:
        """Note load time that nothing waited for."""
        self.hidden_s += seconds
        self._saved += seconds

    def delay(self, seconds: float) -> None:
        """Note what demand loads waited longer; negative where they waited less than they do alone."""
        self.delayed_s += seconds
        self._lost += seconds

    def spend(self, seconds: float) -> None:
        """Note time that predicting took on the critical path."""
        self.overhead_s += seconds
        self._lost += seconds

    def need_baseline(self) -> None:
        """Note that a demand load ran beside a prefetch before it is known what one takes alone."""
        self._blind = True

    def end_pass(self, seconds: float = 0.0) -> None:
        """Note that a forward pass ended, and how long it took; judges at the end of a window."""
        self._passes += 1
        self._seconds += seconds
        if self._passes >= WINDOW_PASSES:
            least = max(LEAST_LOSS_S, LEAST_LOSS_SHARE * self._seconds)
            self._passes, self._seconds = 0, 0.0
            self._judge(least)

    def give_up(self, reason: str) -> None:
        """Switch off for good."""
        self.active = self.usable = False
        self.reason = reason

    def _judge(self, least_loss_s: float) -> None:
        saved, lost = self._saved, self._lost
        self._saved, self._lost = saved / 2, lost / 2
        if not self.usable or not self.judging:
            return
        if not self.active:
            self._windows_left -= 1
            if self._windows_left <= 0:
                self.active = True
                self._saved = self._lost = 0.0
                if self._trial:
                    self.reason = f"on trial after it was {self.reason}"
            return
        if self._blind:
            self._blind = False
            self._pause(1)
            return
        figures = f"saved {max(saved, 0):.4f} s of loading and cost {max(lost, 0):.4f} s in the last passes"
        if self._trial:
            if saved > lost * MARGIN and saved > 0:
                self._trial = False
                self._rest = FIRST_REST
                self.reason = f"on again: it {figures}"
            elif saved > 0 or lost > least_loss_s:  # else nothing was loaded ahead yet: the trial goes on
                self._rest = min(2 * self._rest, LONGEST_REST)
                self._switch_off(figures)
        elif lost > saved * MARGIN and lost - saved > least_loss_s:
            self._switch_off(figures)

    def _switch_off(self, figures: str) -> None:
        self.reason = f"switched off: it {figures}; tried again after {self._rest * WINDOW_PASSES} passes"
        self._trial = True
        self._pause(self._rest)

    def _pause(self, windows: int) -> None:
        self.active = False
        self._windows_left = windows
