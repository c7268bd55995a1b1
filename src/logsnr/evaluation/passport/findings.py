"""Findings: what the measurements mean, in plain words, each number held against a stated threshold.

Every threshold is a constant here with its reason.  Monte Carlo noise is no finding: a number that has a standard
error must pass its threshold by three of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from logsnr.evaluation.passport.card import EndPoint, Finding, HalfPrecision, LabelScan, Level, Source, Start

SIGNIFICANT = 3.0
"""Standard errors by which a number must pass its threshold: by chance one in a thousand does."""
LINEAR_TOLERANCE = 1.05
"""An ideal denoiser's loss is at most the linear one's; 5 % leave room for a network that has learnt just that."""
LABEL_TOLERANCE = 0.075
"""|ln c| above which labels are called wrong: 10 % must be found, and barely trained networks drift by up to 7 %."""
START_KL = 0.02
"""Nats per sample between true starting states and pure noise: by Pinsker, at most one start in ten is a wrong one."""
END_BLUR = 0.04
"""RMSE of x0 at the smallest sigma, over sigma_data: ten times the finest level that sampling ranges go to."""
HALF_EXCESS = 0.25
"""Squared error that half precision adds, over the model's own: a quarter is seen in a loss, in samples hardly."""
END_TARGET = 0.05
"""End-point RMSE over sigma_data that "enough evaluations" means: 26 dB under the data, unseen at normal contrast."""
STRONG_LABEL = 0.2
"""|ln c| above which wrong labels are an error, not a warning."""
STRONG_KL = 0.5
"""Nats from which pure noise is a plainly different start (half of the starts may be wrong ones)."""


def label_trouble(scan: LabelScan | None) -> bool:
    """Whether the scan says that labels are wrong: by the same factor everywhere."""
    return scan is not None and _off(scan) and _levels_agree(scan)


def _off(scan: LabelScan) -> bool:
    if not math.isfinite(scan.factor):
        return False
    off = abs(math.log(scan.factor))
    return off > LABEL_TOLERANCE and off > SIGNIFICANT * scan.stderr


def _levels_agree(scan: LabelScan) -> bool:
    """Whether all levels but one (the faintest may be anything) are off by about the same factor.

    A wrong label is wrong everywhere.  A model with a wrong idea of the data, an overfitted one first of all, wants
    another sigma too, but only where the data's detail decides: at high noise it is right.
    """
    common = math.log(scan.factor)
    apart = [abs(math.log(c) - common) for c in scan.per_level]
    limits = [max(LABEL_TOLERANCE, SIGNIFICANT * error) for error in scan.per_level_stderr]
    return sum(d > limit for d, limit in zip(apart, limits, strict=True)) <= 1


def undertrained(level: Level) -> bool:
    """Whether the model is worse than a linear denoiser at a level."""
    return level.ratio - LINEAR_TOLERANCE > SIGNIFICANT * level.ratio_stderr


def usable_range(levels: Sequence[Level], declared: tuple[float, float]) -> tuple[float, float] | None:
    """The longest run of good levels within the declared range; its ends, where the run reaches them."""
    inside = [level for level in levels if level.trained]
    best: list[Level] = []
    run: list[Level] = []
    for level in inside:
        good = level.non_finite == 0 and math.isfinite(level.loss) and not undertrained(level)
        run = [*run, level] if good else []
        best = run if len(run) > len(best) else best
    if len(best) < 2:
        return None
    high = declared[1] if best[0] is inside[0] else best[0].sigma
    low = declared[0] if best[-1] is inside[-1] else best[-1].sigma
    return low, high


def find(
    *,
    levels: Sequence[Level],
    judged: Sequence[Level],
    scan: LabelScan | None,
    start: Start | None,
    end_points: Sequence[EndPoint],
    teacher_error: float,
    lost: int,
    trajectories: int,
    half: Sequence[HalfPrecision],
    declared: tuple[float, float],
    trained: tuple[float, float],
    own: bool,
    usable: tuple[float, float] | None,
    sigma_data: float,
    source: Source,
) -> tuple[Finding, ...]:
    """Every finding, trouble first.

    Args:
        levels: of the model as it is.
        judged: the same with labels corrected, where they are wrong.
        scan: of the labels.
        start: of pure noise.
        end_points: few-step errors.
        teacher_error: of the teacher they are held against.
        lost: trajectories that ended with nan or inf.
        trajectories: all of them.
        half: half precision.
        declared: the range that sampling would use.
        trained: the range that the model was trained on.
        own: whether the declared range is our own choice, not the caller's.
        usable: the part of it that is usable.
        sigma_data: of the data.
        source: of the clean samples.
    """
    found: list[Finding] = []
    inside = [level for level in levels if level.trained]
    bad = [level for level in judged if level.trained and undertrained(level)] if source != "noise" else []
    found += _non_finite(inside, lost, trajectories)
    if source != "noise":
        hopeless = len(bad) > len(inside) / 2
        found += _labels(scan, source)
        found += _undertrained(bad, len(inside), source, hopeless)
        if start is not None and not (hopeless and source == "model"):
            found += _short(start, levels, (declared, trained), own, sigma_data, source)
        found += _half(half)
    found += _usable(usable, declared)
    found += _nfe(end_points, teacher_error, bool(bad)) if usable else []
    order = {"error": 0, "warning": 1, "info": 2}
    return tuple(sorted(found, key=lambda f: order[f.severity]))


def _non_finite(levels: Sequence[Level], lost: int, trajectories: int) -> list[Finding]:
    bad = [level for level in levels if level.non_finite]
    if not bad and not lost:
        return []
    total = sum(level.non_finite for level in bad)
    where = f"{total} answers with nan or inf, at {_span(bad)}" if bad else "no level by itself"
    ends = f"; {lost} of {trajectories} sampling trajectories end so" if lost else ""
    return [
        Finding(
            kind="non_finite",
            severity="error",
            text=f"The network's answers are not all finite: {where}{ends}. Run it in float32, or check its weights.",
            value=float(total or lost),
            threshold=0.0,
            sigmas=_ends(bad),
        )
    ]


def _misfit(scan: LabelScan) -> Finding:
    narrow = scan.factor > 1
    worst = (max if narrow else min)(zip(scan.per_level, scan.sigmas, strict=True))
    idea = "too narrow, as an overfitted model's is" if narrow else "too wide, as a half-trained model's is"
    return Finding(
        kind="misfit",
        severity="warning",
        text=f"The model's idea of the data is {idea}: it does better on these data when told {1 / worst[0]:.2f} "
        f"sigma where the noise is {worst[1]:.3g}, and is right about other levels, so its labels are not to blame. "
        + ("Train it for less long, or on more data." if narrow else "Train it longer."),
        value=worst[0],
        threshold=math.exp(LABEL_TOLERANCE if narrow else -LABEL_TOLERANCE),
        sigmas=(min(scan.sigmas), max(scan.sigmas)),
    )


def _labels(scan: LabelScan | None, source: Source) -> list[Finding]:
    if scan is None or not _off(scan) or source != "data":
        return []
    if not _levels_agree(scan):
        return [_misfit(scan)]
    c, off = scan.factor, abs(math.log(scan.factor))
    bound = "at least " if scan.at_edge else ""
    fix = "multiply the sigma that labels are made of" if scan.way == "label" else "ask it at sigma times"
    return [
        Finding(
            kind="labels",
            severity="error" if off > STRONG_LABEL else "warning",
            text=f"The noise labels are off by {bound}{abs(c - 1):.1%}: the model behaves as if sigma were "
            f"{c:.3f} sigma (standard error {scan.stderr:.3f}, {len(scan.sigmas)} levels). Check its timestep "
            f"table; or {fix} {'by ' if scan.way == 'label' else ''}{1 / c:.3f}.",
            value=c,
            threshold=math.exp(LABEL_TOLERANCE if c > 1 else -LABEL_TOLERANCE),
            sigmas=(min(scan.sigmas), max(scan.sigmas)),
        )
    ]


def _undertrained(bad: Sequence[Level], total: int, source: Source, hopeless: bool) -> list[Finding]:
    if not bad:
        return []
    worst = max(bad, key=lambda level: level.ratio)
    whose = "" if source == "data" else " of its own samples"
    return [
        Finding(
            kind="undertrained",
            severity="error" if hopeless else "warning",
            text=f"Undertrained at {len(bad)} of {total} noise levels, {_span(bad)}: a linear denoiser{whose} does "
            f"better there. At sigma {worst.sigma:.3g} the model's squared error is {worst.ratio:.3g} times the "
            "linear one's. Train longer, or with more weight there (on more data, if it has learnt its own by "
            "heart); do not sample there.",
            value=worst.ratio,
            threshold=LINEAR_TOLERANCE,
            sigmas=_ends(bad),
        )
    ]


def _short(
    start: Start,
    levels: Sequence[Level],
    ranges: tuple[tuple[float, float], tuple[float, float]],
    own: bool,
    sigma_data: float,
    source: Source,
) -> list[Finding]:
    """Ends of the (declared, trained) range, unless it is we who end it there."""
    out = []
    (low, high), (least, most) = ranges
    if start.kl > START_KL and not (own and high < most):
        fix = "Sample from a larger sigma, it was trained on more" if high < most else "Train to a larger sigma"
        seen = ""
        if math.isfinite(start.mean_shift) and source == "data":
            seen = (
                f" Samples from pure noise lie {start.mean_shift:+.2f} +- {start.mean_shift_stderr:.2f} of the data's "
                "standard deviation along its mean."
            )
        out.append(
            Finding(
                kind="short",
                severity="error" if start.kl > STRONG_KL else "warning",
                text=f"The range is too short for the data: at its largest sigma, {start.sigma:.3g}, {start.kl:.2g} "
                f"nats of the data are left (mean {start.mean_leak:.2f} and variance {start.variance_leak:.1%} of the "
                f"noise's, in their directions), and sampling starts without them.{seen} {fix}, or start from noised "
                "data.",
                value=start.kl,
                threshold=START_KL,
                sigmas=(start.sigma, start.sigma),
            )
        )
    last = next((level for level in reversed(levels) if level.trained), None)
    if last is not None and math.isfinite(last.loss) and not (own and low > least):
        fix = "Sample to a smaller sigma, it was trained on less" if low > least else "Train to a smaller sigma"
        blur = last.sigma * math.sqrt(last.loss) / sigma_data
        if blur > END_BLUR:
            out.append(
                Finding(
                    kind="short",
                    severity="warning",
                    text=f"The range stops early: at its smallest sigma, {last.sigma:.3g}, denoised samples are still "
                    f"{blur:.1%} of the data's standard deviation off (RMSE). {fix}.",
                    value=blur,
                    threshold=END_BLUR,
                    sigmas=(last.sigma, last.sigma),
                )
            )
    return out


def _half(half: Sequence[HalfPrecision]) -> list[Finding]:
    bad = [h for h in half if h.non_finite or h.excess > HALF_EXCESS]
    if not bad:
        return []
    worst = max(bad, key=lambda h: math.inf if h.non_finite else h.excess)
    names = " and ".join(sorted({h.dtype for h in bad}))
    lost = sum(h.non_finite for h in bad)
    what = (
        f"{lost} answers that are finite in float32 are not"
        if lost
        else f"rounding adds {worst.excess:.0%} to the squared error at sigma {worst.sigma:.3g}"
    )
    return [
        Finding(
            kind="half",
            severity="error" if lost else "warning",
            text=f"Numerical trouble in {names}: {what}. Run the network in float32 at "
            f"sigma {min(h.sigma for h in bad):.3g} to {max(h.sigma for h in bad):.3g}.",
            value=float(lost) if lost else worst.excess,
            threshold=0.0 if lost else HALF_EXCESS,
            sigmas=(min(h.sigma for h in bad), max(h.sigma for h in bad)),
        )
    ]


def _usable(usable: tuple[float, float] | None, declared: tuple[float, float]) -> list[Finding]:
    if usable is None:
        text, value = "No range of noise levels is usable.", 0.0
    else:
        low, high = usable
        part = "all" if usable == declared else "part"
        text = (
            f"Usable from sigma {low:.3g} to {high:.3g} (log-SNR {-2 * math.log(high):.1f} to {-2 * math.log(low):.1f})"
            f": {part} of the range it declares, {declared[0]:.3g} to {declared[1]:.3g}."
        )
        value = math.log(high / low) / math.log(declared[1] / declared[0])
    return [Finding(kind="usable", severity="info", text=text, value=value, sigmas=usable)]


def _nfe(points: Sequence[EndPoint], teacher_error: float, bad: bool) -> list[Finding]:
    """What few evaluations cost; and how many to choose, unless some of the levels they ask are bad."""
    if not points:
        return []
    best = [min((p for p in points if p.nfe == n), key=lambda p: p.rmse) for n in sorted({p.nfe for p in points})]
    listed = ", ".join(f"{p.rmse:.3f} at {p.nfe}" for p in best)
    # Few trajectories scatter: enough is what all larger numbers confirm.
    enough = next((p for i, p in enumerate(best) if all(q.rmse <= END_TARGET for q in best[i:])), None)
    choice = "No number is recommended: they ask the model where it is undertrained."
    if not bad:
        choice = (
            f"Choose {enough.nfe} with {enough.solver}: within {END_TARGET:.0%}."
            if enough
            else f"None is within {END_TARGET:.0%}: take {best[-1].nfe} or more with {best[-1].solver}, or calibrate."
        )
    unsure = f" (The many-step reference itself is known to {teacher_error:.3f}.)" if teacher_error > END_TARGET else ""
    return [
        Finding(
            kind="nfe",
            severity="info",
            text=f"Expected end-point error, RMSE over the data's standard deviation: {listed} evaluations. "
            f"{choice}{unsure}",
            value=math.nan if bad else float(enough.nfe) if enough else math.inf,
        )
    ]


def _ends(levels: Sequence[Level]) -> tuple[float, float] | None:
    return (min(level.sigma for level in levels), max(level.sigma for level in levels)) if levels else None


def _span(levels: Sequence[Level]) -> str:
    ends = _ends(levels)
    assert ends is not None
    low, high = ends
    return f"sigma {low:.3g}" if low == high else f"sigma {low:.3g} to {high:.3g}"
