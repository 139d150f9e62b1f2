"""Facts and charts -> one HTML file: light or dark as the reader's screen is, for narrow screens, too."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from mistral_dist.display import leakage, minutes
from mistral_dist.report import charts
from mistral_dist.report.compare import Difference, difference, differing_fields
from mistral_dist.report.facts import Facts
from mistral_dist.resampling import is_interval

WORST, SAMPLES = 12, 8
"""Examples shown."""


def page(facts: Facts) -> str:
    """The report of one run."""
    test, manifest = facts.test, facts.manifest
    predictions = facts.evaluation("predictions")
    return _render(
        "run.html",
        title=facts.name,
        facts=facts,
        recipe=facts.recipe,
        recipe_text=facts.recipe.dump(),
        manifest=manifest,
        splits=charts.splits(manifest) if manifest else None,
        lengths=charts.lengths(facts.lengths) if facts.lengths is not None and len(facts.lengths) else None,
        curves=charts.curves(facts),
        launches=facts.status.get("launches") or 1,
        leakage=leakage(manifest) if manifest else "",
        spent=minutes(sum(entry["seconds"] for entry in facts.steps)),
        test=test,
        rows=_measures(test) if test else [],
        measures=charts.measures(test) if test else None,
        confusion=charts.confusion(test["labels"], test["tuned"]["confusion_matrix"]) if test and "labels" in test else None,
        verdict=_verdict(test),
        events=facts.events[: charts.EVENTS],
        worst=facts.evaluation("worst")[:WORST],
        wrong=len(facts.evaluation("worst")),
        samples=[line for line in predictions if "reference" in line][:SAMPLES],
        commands=_commands(facts),
    )


def comparison(runs: Sequence[Facts]) -> str:
    """Several runs, each compared with the first; those of one name are told apart by their paths."""
    names = [facts.name for facts in runs]
    names = [str(facts.run.path) if names.count(facts.name) > 1 else facts.name for facts in runs]
    tuned = [{**facts.test["tuned"], **facts.test["tuned"].get("written", {})} if facts.test else {} for facts in runs]
    known = {name: None for found in tuned for name, value in found.items() if is_interval(value) and not name.endswith("_micro")}
    return _render(
        "comparison.html",
        title=" · ".join(names),
        names=names,
        runs=runs,
        fields=differing_fields(runs),
        rows=[(name.replace("_", " "), [_told(found.get(name)) for found in tuned]) for name in known],
        differences=[difference(runs[0], facts, len(runs) - 1) for facts in runs[1:]],
    )


def _render(template: str, **known: Any) -> str:
    loader = jinja2.PackageLoader("mistral_dist.report", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"chart": lambda figure: jinja2.utils.markupsafe.Markup(charts.division(figure)), "thousands": "{:,}".format}
    return environment.get_template(template).render(plotly=jinja2.utils.markupsafe.Markup(get_plotlyjs()), **known)


def _measures(test: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(measure, base, tuned) in words."""
    base, tuned = test["base"], test["tuned"]
    # where each answer is a label, all that is said over all decisions is the accuracy
    known = [name for name in base if not name.endswith("_micro") or base[name] != base["accuracy"] or tuned[name] != tuned["accuracy"]]
    found = [(name, base[name], tuned[name]) for name in known if is_interval(base[name])]
    written = base.get("written", {})
    found += [(name, written[name], tuned["written"][name]) for name in written if is_interval(written[name])]
    return [(name.replace("_", " "), _told(before), _told(after)) for name, before, after in found]


def _told(measure: dict[str, float] | None) -> str:
    return "" if measure is None else f"{measure['value']:.3f}  [{measure['low']:.3f}, {measure['high']:.3f}]"


def _verdict(test: dict[str, Any] | None) -> str:
    """The result in a sentence."""
    if test is None:
        return "not evaluated yet"
    name = "accuracy" if "accuracy" in test["base"] else "loss"
    gained = test["difference"][name]
    change = f"{name} {test['base'][name]['value']:.3f} → {test['tuned'][name]['value']:.3f} on {test['n']:,} held-out examples"
    between = f"{gained['value']:+.3f} [{gained['low']:+.3f}, {gained['high']:+.3f}]"
    p_value = test["difference"].get("mcnemar", {}).get("p_value")
    if not Difference(name, gained, test["n"], p_value).is_real:
        return f"{change}: no difference shown; with its 95 % interval the change is {between}"
    return f"{change}: a change of {between}"


def _commands(facts: Facts) -> list[tuple[str, str]]:
    """(what for, command)."""
    run = shlex.quote(str(facts.run.path))
    recipe = shlex.quote(str(Path(facts.run.path) / "recipe.yaml"))
    return [
        ("the same run again, elsewhere", f"mistral-dist train {recipe} run.dir={shlex.quote(str(facts.run.path) + '-again')}"),
        ("evaluate", f"mistral-dist evaluate {run}"),
        ("ask it", f"mistral-dist chat {run}"),
        ("have it answer a file", f"mistral-dist predict {run} FILE --out OUT"),
        ("serve it", f"mistral-dist serve {run}"),
        ("a folder for any engine", f"mistral-dist export {run} OUT"),
    ]
