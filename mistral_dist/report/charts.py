"""Facts -> pictures, by plotly: zoomable, readable on light and on dark paper."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from mistral_dist.report.facts import Facts
from mistral_dist.resampling import is_interval

BASE, TUNED, EXTRA, BAD = "#8a8f98", "#3b82f6", "#f59e0b", "#ef4444"
"""Colours that can be told apart on white and on black, also by those who see no red and green."""
INK, LINE = "#808088", "rgba(128, 128, 136, 0.25)"
POINTS = 1500
"""Of a curve at most: more than a screen has. Beyond that each is the mean of several steps."""
SHARES = ("accuracy", "precision_macro", "recall_macro", "f1_macro", "exact_match", "rouge_l", "stop_rate")
"""Measures from 0 to 1 that are drawn."""
EVENTS = 200
"""Events that are marked in the curve of the loss, and listed; with more nothing else could be seen."""
CELLS = 12
"""Labels of a confusion matrix whose counts are written into it; more would not be legible."""


def curves(facts: Facts) -> list[tuple[str, go.Figure]]:
    """(title, picture) of what was measured at each step."""
    steps = facts.steps
    if not steps:
        return []
    found = [("Loss, nats per target token", _loss(facts, steps))]
    for key, title, scale in (
        ("learning_rate", "Learning rate", 1.0),
        ("grad_norm", "Gradient norm before clipping", 1.0),
        ("tokens_per_second", "Tokens per second", 1.0),
        ("memory_bytes", "Peak memory of rank 0, GiB", 2.0**-30),
    ):
        at, values = _thinned(steps, key)
        if len(at):
            figure = go.Figure(go.Scatter(x=at, y=values * scale, mode="lines", line={"color": TUNED, "width": 1.5}))
            found.append((title, _styled(figure.update_yaxes(rangemode="tozero").update_xaxes(title="step"))))
    return found


def _loss(facts: Facts, steps: Sequence[Mapping[str, Any]]) -> go.Figure:
    at, values = _thinned(steps, "loss")
    figure = go.Figure(go.Scatter(x=at, y=values, mode="lines", name="train", line={"color": TUNED, "width": 1.5}))
    validations = [(entry["step"], entry["loss"]) for entry in facts.validations if entry.get("loss") is not None]
    if validations:
        x, y = zip(*validations, strict=True)
        figure.add_scatter(x=x, y=y, mode="lines+markers", name="validation", line={"color": EXTRA})
    # all at once: plotly looks at every shape each time that one is added
    figure.update_layout(shapes=[_mark(step, what) for step, what in facts.events[:EVENTS]])
    return _styled(figure.update_xaxes(title="step"), legend=bool(validations))


def _mark(step: int, what: str) -> dict[str, Any]:
    line = {"color": BAD if "back to" in what or "not trained" in what else BASE, "width": 1, "dash": "dot"}
    return {"type": "line", "x0": step, "x1": step, "y0": 0, "y1": 1, "yref": "y domain", "line": line}


def measures(test: Mapping[str, Any]) -> go.Figure | None:
    """Base and tuned with their 95 % intervals, those that go from 0 to 1; None where there are none."""
    names = [name for name, value in test["base"].items() if _is_share(name, value)]
    written = test["base"].get("written", {})
    found = {name: (test["base"][name], test["tuned"][name]) for name in names}
    found |= {name: (value, test["tuned"]["written"][name]) for name, value in written.items() if _is_share(name, value)}
    if not found:
        return None
    figure = go.Figure()
    for number, (name, colour) in enumerate((("base", BASE), ("tuned", TUNED))):
        ends = [both[number] for both in found.values()]
        values = [end["value"] for end in ends]
        bars = {"type": "data", "symmetric": False, "array": [e["high"] - e["value"] for e in ends]}
        bars["arrayminus"] = [e["value"] - e["low"] for e in ends]
        figure.add_bar(x=[_words(name) for name in found], y=values, name=name, marker={"color": colour}, error_y={**bars, "color": INK})
    figure.update_yaxes(range=[0, 1])
    return _styled(figure.update_xaxes(type="category"), legend=True)


def confusion(labels: Sequence[str], matrix: Sequence[Sequence[int]]) -> go.Figure:
    """Rows: what it is; columns: what the model said. Coloured by the share of the row."""
    counts = np.array(matrix)
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    names = [_plain(label) for label in labels]
    columns = [*names, *(["no label"] if counts.shape[1] > len(labels) else [])]
    cells = {"text": counts, "texttemplate": "%{text}"} if len(labels) <= CELLS else {}
    told = "it is %{y}, it says %{x}: %{customdata}<extra></extra>"
    scale = [[0, "rgba(59, 130, 246, 0.04)"], [1, "rgba(59, 130, 246, 0.9)"]]
    heat = go.Heatmap(
        z=shares,
        x=columns,
        y=names,
        customdata=counts,
        zmin=0,
        zmax=1,
        showscale=False,
        hovertemplate=told,
        colorscale=scale,
        **cells,
    )
    figure = go.Figure(heat)
    figure.update_xaxes(type="category")  # a label may look like a number, or a date
    figure.update_yaxes(type="category", autorange="reversed")
    figure.update_layout(height=140 + 28 * min(len(labels), 26), xaxis_title="it says", yaxis_title="it is")
    return _styled(figure, height=None).update_xaxes(showgrid=False).update_yaxes(showgrid=False)


def splits(manifest: Mapping[str, Any]) -> go.Figure | None:
    """How many examples of each label each split has; None without labels."""
    found = manifest.get("labels") or {}
    if not any(found.values()):
        return None
    figure = go.Figure()
    for split, colour in (("train", TUNED), ("validation", EXTRA), ("test", BASE)):
        counts = found.get(split, {})
        figure.add_bar(x=[_plain(label) for label in counts], y=list(counts.values()), name=split, marker={"color": colour})
    figure.update_layout(barmode="stack")
    return _styled(figure.update_xaxes(type="category"), legend=True)


def lengths(tokens: np.ndarray) -> go.Figure:
    """How long the train examples are."""
    counts, edges = np.histogram(tokens, bins=min(60, max(1, int(tokens.max() - tokens.min()) + 1)))
    bars = go.Bar(x=(edges[:-1] + edges[1:]) / 2, y=counts, width=np.diff(edges), marker={"color": TUNED})
    return _styled(go.Figure(bars).update_xaxes(title="tokens").update_yaxes(title="examples"))


def division(figure: go.Figure) -> str:
    """A division for a page that has plotly's script."""
    config = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["select2d", "lasso2d"]}
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config=config))


def _styled(figure: go.Figure, legend: bool = False, height: int | None = 280) -> go.Figure:
    paper = {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "margin": {"l": 8, "r": 8, "t": 32, "b": 8}}
    figure.update_layout(modebar={"bgcolor": "rgba(0,0,0,0)", "color": INK, "activecolor": TUNED})
    figure.update_layout(**paper, font={"color": INK, "size": 12}, showlegend=legend, hovermode="x unified" if legend else "closest")
    if legend:
        figure.update_layout(legend={"orientation": "h", "y": -0.25, "yanchor": "top", "x": 0})
    if height is not None:
        figure.update_layout(height=height)
    figure.update_xaxes(gridcolor=LINE, zerolinecolor=LINE, automargin=True)
    figure.update_yaxes(gridcolor=LINE, zerolinecolor=LINE, automargin=True)
    return figure


def _thinned(entries: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of where there is a value; of many, the means of equal shares."""
    known = [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]
    at, values = (np.array(column, np.float64) for column in (zip(*known, strict=True) if known else ([], [])))
    size = -(-len(at) // POINTS) or 1
    bounds = np.arange(0, len(at), size)
    if size == 1:
        return at, values
    sizes = np.diff([*bounds, len(at)])
    return np.add.reduceat(at, bounds) / sizes, np.add.reduceat(values, bounds) / sizes


def _is_share(name: str, value: Any) -> bool:
    return name in SHARES and is_interval(value)


def _plain(label: str) -> str:
    """As plotly shows it unchanged: it reads some tags of HTML."""
    return html.escape(label, quote=False)


def _words(name: str) -> str:
    return name.replace("_", " ")
