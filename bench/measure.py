"""What the rows of the bench share: samples, ratios, and their wording.

A figure is the median of repetitions in which baseline and userpilot took
turns, so that a machine that slows down slows both.
"""
import statistics

MET, MISSED, SHOWN = "met", "**missed**", ""


class NotMeasured(Exception):
    """A row cannot be measured here; the reason in words."""


def percentile(samples, p):
    """The sample below which a share p of all lies."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(p * len(ordered)))]


def alternate(repetitions, **sides):
    """{name: samples} of functions called in turns, the order changing."""
    found = {name: [] for name in sides}
    for i in range(repetitions):
        for name in list(sides)[::1 if i % 2 == 0 else -1]:
            found[name].append(sides[name]())
    return found


def number(value):
    """With three digits that count, thousands apart."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return format(round(value), ",")
    return "%.*f" % (1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3,
                     value)


def figure(samples, unit):
    """Median, and the range if there is one."""
    if samples is None:
        return ""
    if not isinstance(samples, (list, tuple)):
        samples = [samples]
    median = number(statistics.median(samples))
    if len(samples) == 1:
        return "%s %s" % (median, unit)
    return "%s %s (%s – %s)" % (median, unit, number(min(samples)),
                                number(max(samples)))


class Result:
    """One line of the report."""

    def __init__(self, what, baseline=None, ours=None, unit="s", target=None,
                 ratio=None, at_least=False, note="", ours_unit=None):
        self.what = what
        self.baseline = figure(baseline, unit)
        self.ours = figure(ours, ours_unit or unit)
        self.note = note
        if ratio is None and baseline is not None and ours is not None:
            ratio = median(ours) / median(baseline)
        self.ratio = "" if ratio is None else "%.2f ×" % ratio
        judged = ratio if ratio is not None else \
            None if ours is None else median(ours)
        self.target = ""
        self.verdict = SHOWN
        if target is not None:
            sign = "≥" if at_least else "≤"
            self.target = "%s %s%s" % (sign, ("%g" % target),
                                      " ×" if ratio is not None else
                                      " " + (ours_unit or unit))
            good = judged >= target if at_least else judged <= target
            self.verdict = MET if good else MISSED

    @classmethod
    def missing(cls, what, reason):
        """A line that says why there is no figure."""
        result = cls(what, note="not measured: %s" % reason)
        result.verdict = "not measured"
        return result

    def line(self):
        return "| %s |" % " | ".join([self.what + (
            "<br>*%s*" % self.note if self.note else ""), self.baseline,
            self.ours, self.ratio, self.target, self.verdict])


def median(samples):
    return statistics.median(samples if isinstance(samples, (list, tuple))
                             else [samples])
