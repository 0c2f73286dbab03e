"""The report's figures as inline SVG: text stays text, nothing is fetched, no script.

matplotlib's ``Figure`` and SVG backend are used directly; pyplot would cost start-up time and hold state.
Each figure carries a title and a description for screen readers, and differs by shape as well as colour.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from common.measure import Headline
    from server.report import Report, Round

BLUE, ORANGE, GREY, LIGHT, RED = "#1f5a8c", "#b85c00", "#6b7280", "#c9dbea", "#b3261e"

STYLE = {
    "svg.fonttype": "none",  # text stays text: selectable, searchable, small
    "svg.hashsalt": "feverfew",  # the same report gives the same bytes
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": "#1f2933",
    "xtick.color": "#1f2933",
    "ytick.color": "#1f2933",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.columnspacing": 1.2,
    "legend.handlelength": 1.6,
}

SITE_HEIGHT_INCHES = 0.24
LABEL_LENGTH = 18
MOST_BARS = 50
"""More would touch each other; a hundred take six times as long to draw as one piece."""


def loss_curve(report: Report) -> Markup | None:
    """Training loss by round."""
    known = [(entry.round, entry.train_loss) for entry in report.rounds if entry.train_loss is not None]
    if not known:
        return None
    with _axes("loss", "Training loss by round", _span("loss", [loss for _, loss in known])) as (axes, drawn):
        rounds, losses = zip(*known, strict=True)
        axes.plot(rounds, losses, color=BLUE, **_marker(known))
        _label_rounds(axes, report.rounds, "training loss")
    return drawn[0]


def headline_curve(report: Report) -> Markup | None:
    """Validation AUROC or Dice by round, with its interval where there is one."""
    headline = report.headline
    key, name = headline.key, headline.name
    known = [entry for entry in report.rounds if getattr(entry, key) is not None]
    if not known:
        return None
    values = [getattr(entry, key) for entry in known]
    with _axes("headline", f"Validation {name} by round", _span(name, values)) as (axes, drawn):
        intervals = [(entry.round, getattr(entry, f"{key}_interval")) for entry in known]
        bounded = [(number, *interval) for number, interval in intervals if interval]
        if bounded:
            rounds, lows, highs = zip(*bounded, strict=True)
            axes.fill_between(rounds, lows, highs, color=LIGHT, linewidth=0, label="95 % interval")
        axes.plot([entry.round for entry in known], values, color=BLUE, label=name, **_marker(known))
        if headline.guessing is not None:
            axes.axhline(headline.guessing, color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="guessing")
        axes.legend(loc="lower right", ncols=3)
        axes.set_ylim(min(_floor(headline), *values), 1.01)
        _label_rounds(axes, report.rounds, name)
    return drawn[0]


def _floor(headline: Headline) -> float:
    """The lowest value that is shown though no site reached down to it."""
    return 0.0 if headline.guessing is None else headline.guessing - 0.1


def answers_by_round(report: Report) -> Markup | None:
    """Valid updates of those asked for, by round."""
    if not report.rounds:
        return None
    fewest = min(report.rounds, key=lambda entry: entry.sites_valid)
    description = (
        f"Fewest valid updates: {fewest.sites_valid} of {fewest.sites_asked} in round {fewest.round}."
    )
    with _axes("answers", "Valid updates by round", description) as (axes, drawn):
        rounds = [entry.round for entry in report.rounds]
        asked = [entry.sites_asked for entry in report.rounds]
        valid = [entry.sites_valid for entry in report.rounds]
        if len(rounds) <= MOST_BARS:
            axes.bar(rounds, asked, width=0.8, color="white", edgecolor=GREY, linewidth=0.8, label="asked")
            axes.bar(rounds, valid, width=0.8, color=BLUE, label="valid")
        else:
            edges = [rounds[0] - 0.5, *(number + 0.5 for number in rounds)]
            axes.stairs(asked, edges, color=GREY, linewidth=0.8, label="asked")
            axes.stairs(valid, edges, color=BLUE, fill=True, label="valid")
        quorum = report.plan.get("quorum")
        if quorum is not None:
            axes.axhline(quorum, color=ORANGE, linewidth=1.4, linestyle=(0, (4, 3)), label="quorum")
        axes.set_ylim(0, max(asked) * 1.25 + 0.5)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.legend(loc="upper right", ncols=3)
        _label_rounds(axes, report.rounds, "sites")
    return drawn[0]


def roc_curve(report: Report) -> Markup | None:
    """ROC curve of the final model on the released statistics of all sites."""
    final = report.final
    if not final.roc or final.auroc is None:
        return None
    description = f"Curve from (0, 0) to (1, 1); the area under it is {final.auroc:.3f}."
    with _axes("roc", "ROC curve of the final model", description, width=4.0, height=3.7) as (axes, drawn):
        false, true = zip(*final.roc, strict=True)
        axes.fill_between(false, true, color=LIGHT, alpha=0.6, linewidth=0)
        axes.plot(false, true, color=BLUE, linewidth=1.8, label=f"final model, area {final.auroc:.3f}")
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="guessing, area 0.5")
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
        axes.set_xlabel("false positive rate (1 - specificity)")
        axes.set_ylabel("true positive rate (sensitivity)")
        axes.legend(loc="lower right")
    return drawn[0]


def headline_by_site(report: Report) -> Markup | None:
    """AUROC or Dice by site with its interval, and the exact value where it is known."""
    results, headline = report.final.per_site, report.headline
    found = {site: result.value(headline) for site, result in results.items()}
    known = {site: value for site, value in found.items() if value is not None}
    if not known:
        return None
    low, high = min(known, key=lambda site: known[site]), max(known, key=lambda site: known[site])
    description = (
        f"{len(known)} sites; lowest {_label(low)} with {known[low]:.3f}, "
        f"highest {_label(high)} with {known[high]:.3f}. The table holds all values."
    )
    title, height = f"{headline.name} by site", _site_height(results)
    with _axes("sites", title, description, width=4.0, height=height) as (axes, drawn):
        start = headline.guessing or 0.0
        for row, (site, result) in enumerate(results.items()):
            _draw_site(axes, row, known.get(site), result.interval(headline), start=start)
        _scatter_sites(axes, list(found.values()), "released", BLUE, "o", BLUE)
        exact = [result.exact(headline) for result in results.values()]
        _scatter_sites(axes, exact, "exact", ORANGE, "D", "none")
        lows = [interval[0] for result in results.values() if (interval := result.interval(headline))]
        axes.set_xlim(max(0.0, min([start - 0.05, *lows]) - 0.02), 1.01)
        about = f"bar from {start:g}, guessing; " if headline.guessing else ""
        axes.axvline(start, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlabel(f"{headline.name} ({about}line: 95 % interval)")
        _label_sites(axes, list(results))
    return drawn[0]


def _draw_site(
    axes: Any, row: int, value: float | None, interval: tuple[float, float] | None, *, start: float
) -> None:
    if value is None:
        axes.text(start + 0.005, row, "not determined", va="center", color=GREY)
        return
    axes.barh(row, value - start, left=start, height=0.62, color=LIGHT)
    if interval:
        axes.plot(interval, (row, row), color=BLUE, linewidth=1.6, marker="|", markersize=7)


def epsilon_by_site(report: Report) -> Markup | None:
    """Epsilon of this run against the plan's target and the site's budget."""
    costs = {site: cost for site, cost in report.privacy.per_site.items() if cost.epsilon is not None}
    if not costs or report.privacy.unit == "none":
        return None
    target = report.plan.get("privacy", {}).get("target_epsilon")
    most = max(costs, key=lambda site: costs[site].epsilon or 0.0)
    description = f"{len(costs)} sites; highest {_label(most)} with {costs[most].epsilon:.2f}."
    with _axes(
        "epsilon", "Epsilon of this run by site", description, width=4.0, height=_site_height(costs)
    ) as (
        axes,
        drawn,
    ):
        totals = [cost.total_epsilon for cost in costs.values()]
        if any(total is not None for total in totals):
            axes.barh(
                range(len(costs)),
                [total or 0 for total in totals],
                height=0.7,
                color="#e5e7eb",
                label="all runs",
            )
        epsilons = [cost.epsilon or 0.0 for cost in costs.values()]
        axes.barh(range(len(costs)), epsilons, height=0.45, color=BLUE, label="this run")
        if target is not None:
            axes.axvline(target, color=ORANGE, linewidth=1.4, linestyle=(0, (4, 3)), label="target")
        _scatter_sites(axes, [cost.budget for cost in costs.values()], "budget", RED, "|", RED, size=90)
        axes.set_xlim(left=0)
        axes.set_xlabel("epsilon (less is more private)")
        _label_sites(axes, list(costs))
    return drawn[0]


@contextmanager
def _axes(
    name: str, title: str, description: str, *, width: float = 3.4, height: float = 2.5
) -> Iterator[tuple[Any, list[Markup]]]:
    """Yields axes to draw on and a list that holds the finished SVG afterwards."""
    drawn: list[Markup] = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure.subplots(), drawn
        drawn.append(_inline(figure, name=name, title=title, description=description))


def _inline(figure: Figure, *, name: str, title: str, description: str) -> Markup:
    """Turns a figure into SVG that may stand beside others in one page."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(
        buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = buffer.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
    body = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', body)
    width, height = (72 * inches for inches in figure.get_size_inches())
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-labelledby="{name}-title {name}-description">'
        f'<title id="{name}-title">{html.escape(title)}</title>'
        f'<desc id="{name}-description">{html.escape(description)}</desc>{body}'
    )


def _scatter_sites(
    axes: Any,
    values: Sequence[float | None],
    label: str,
    color: str,
    marker: str,
    face: str,
    *,
    size: float = 22,
) -> None:
    known = [(value, row) for row, value in enumerate(values) if value is not None]
    if known:
        places, rows = zip(*known, strict=True)
        filled = {"color": color} if marker == "|" else {"edgecolors": color, "facecolors": face}
        axes.scatter(places, rows, s=size, marker=marker, label=label, linewidths=1.4, zorder=4, **filled)


def _label_sites(axes: Any, sites: Sequence[str]) -> None:
    axes.set_yticks(range(len(sites)), labels=[_label(site) for site in sites])
    axes.set_ylim(len(sites) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.figure.legend(loc="outside upper center", ncols=4)


def _label_rounds(axes: Any, rounds: Sequence[Round], label: str) -> None:
    axes.set_xlim(rounds[0].round - 0.6, rounds[-1].round + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("round")
    axes.set_ylabel(label)


def _marker(points: Sequence[object]) -> dict[str, Any]:
    """A marker on each point while there are few; a single point would be invisible without."""
    return {"linewidth": 1.8, "marker": "o" if len(points) <= 30 else None, "markersize": 3}


def _site_height(sites: Any) -> float:
    return 0.95 + SITE_HEIGHT_INCHES * max(len(sites), 3)


def _span(what: str, values: Sequence[float]) -> str:
    return f"{what} from {values[0]:.3f} in the first measured round to {values[-1]:.3f} in the last."


def _label(site: str) -> str:
    """A short label in characters that every font has; the tables show the whole name."""
    plain = "".join(character if " " <= character <= "~" else "?" for character in site)
    return plain if len(plain) <= LABEL_LENGTH else plain[: LABEL_LENGTH - 3] + "..."
