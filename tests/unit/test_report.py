"""What a report says of a run: what users wrote shown as they wrote it, differences judged, and told where they cannot be."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mistral_dist.cli.use import report
from mistral_dist.config import Recipe
from mistral_dist.errors import RunError
from mistral_dist.report import charts
from mistral_dist.report.compare import Difference, difference, differing_fields
from mistral_dist.report.facts import Facts
from mistral_dist.report.page import comparison, page
from mistral_dist.run import RunDirectory
from tests.conftest import LABELS, WriteRecipe

NASTY = '</script><img src=x onerror="alert(1)"> & {{ 7 * 7 }}'


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def write(file: Path, lines: Sequence[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(write_recipe: WriteRecipe, tmp_path: Path) -> Path:
    """A run of 40 steps that was evaluated on 30 examples, of which the tuned model gets 20."""
    return evaluated(tmp_path / "run", write_recipe(), [n < 20 for n in range(30)])


def evaluated(folder: Path, recipe: Path, right: Sequence[bool]) -> Path:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(Recipe.load(recipe, [f"run.dir={folder}"]).dump())
    write(folder / "metrics.jsonl", [{"step": n, "loss": 2.0 / n, "learning_rate": 1e-3, "seconds": 1.0} for n in range(1, 41)])
    predictions = [
        {"id": str(n), "place": f"rows:{n}", "label": "torch", "tuned": "torch" if is_right else "numpy"}
        for n, is_right in enumerate(right)
    ]
    write(folder / "evaluation" / "predictions.jsonl", predictions)
    accuracy = interval(sum(right) / len(right))
    one = {"accuracy": accuracy, "per_class": {label: {"f1": 0.5, "support": 5} for label in LABELS}, "confusion_matrix": [[5] * 7] * 6}
    test = {
        "split": "test",
        "task": "classification",
        "method": "likelihood",
        "n": len(right),
        "labels": list(LABELS),
        "base": one,
        "tuned": one,
        "difference": {"accuracy": interval(0), "mcnemar": {"only_base_right": 1, "only_tuned_right": 1, "p_value": 1.0}},
    }
    (folder / "evaluation" / "test.json").write_text(json.dumps(test))
    return folder


def losses(folder: Path, recipe: Path, each: Sequence[float], ids: Sequence[str] | None = None, targets: int = 10) -> Path:
    """A run of another task, with the summed loss of each test example."""
    evaluated(folder, recipe, [True])
    test = {"task": "pretrain", "n": len(each), "base": {"loss": interval(1)}, "tuned": {"loss": interval(1)}, "difference": {}}
    (folder / "evaluation" / "test.json").write_text(json.dumps(test))
    names = ids or [str(n) for n in range(len(each))]
    write(
        folder / "evaluation" / "scores.jsonl",
        [{"id": id, "targets": targets, "tuned": loss} for id, loss in zip(names, each, strict=True)],
    )
    return folder


def of(*folders: Path) -> list[Facts]:
    return [Facts(RunDirectory(folder)) for folder in folders]


def shown(html: str) -> str:
    """The page without plotly's script, which has tags in its strings."""
    return html.partition("<body>")[2]


def test_what_users_wrote_is_text_and_never_markup(run: Path) -> None:
    status = {"state": "failed", "message": NASTY, "step": 40, "steps": 40}
    (run / "status.json").write_text(json.dumps(status))
    worst = {"id": "1", "place": NASTY, "label": NASTY, "tuned": NASTY, "probability": 0.9, "text": NASTY}
    write(run / "evaluation" / "worst.jsonl", [worst])
    test = json.loads((run / "evaluation" / "test.json").read_text())
    test["labels"][0] = NASTY
    for model in ("base", "tuned"):
        test[model]["per_class"][NASTY] = test[model]["per_class"]["numpy"]
    (run / "evaluation" / "test.json").write_text(json.dumps(test))
    body = shown(page(*of(run)))
    assert "<img" not in body
    assert "49" not in re.findall(r"& (\S+)", body)
    assert body.count("&lt;/script&gt;&lt;img src=x") >= 5, "message, place, label, answer, text"
    assert body.count("<script") == body.count("</script>")


def test_a_run_that_has_only_begun_has_a_page(run: Path) -> None:
    for name in ("evaluation/test.json", "evaluation/predictions.jsonl", "metrics.jsonl"):
        (run / name).unlink()
    body = shown(page(*of(run)))
    assert "never started" in body
    assert "No step was made." in body
    assert "Not evaluated yet" in body


def test_an_answer_that_is_no_label_has_a_column(run: Path) -> None:
    (facts,) = of(run)
    assert facts.test is not None
    figure = charts.confusion(facts.test["labels"], facts.test["tuned"]["confusion_matrix"])
    assert list(figure.data[0].x) == [*LABELS, "no label"]
    assert list(figure.data[0].y) == list(LABELS)
    assert charts.confusion(["<b>a</b>", "b"], [[1, 0], [0, 1]]).data[0].x[0] == "&lt;b&gt;a&lt;/b&gt;", "plotly reads some tags"


def test_a_long_curve_is_thinned_to_its_means(run: Path) -> None:
    write(run / "metrics.jsonl", [{"step": n, "loss": float(n % 2), "seconds": 1.0} for n in range(1, 6001)])
    loss = dict(charts.curves(*of(run)))["Loss, nats per target token"].data[0]
    assert len(loss.x) == charts.POINTS
    assert set(loss.y) == {0.5}
    assert loss.x[0] == 2.5, "the middle of steps 1 to 4"


def test_thousands_of_events_do_not_hold_a_report_up(run: Path) -> None:
    write(run / "untrained.jsonl", [{"step": n, "because": "loss is nan"} for n in range(1, 3001)])
    body = shown(page(*of(run)))
    assert "3000 events" in body
    assert body.count("not trained: loss is nan") == charts.EVENTS


@pytest.mark.parametrize(
    ("right", "verdict"),
    [
        ([n < 29 for n in range(30)], "better"),
        ([n < 8 for n in range(30)], "worse"),
        ([n < 22 for n in range(30)], "no difference shown"),
    ],
)
def test_a_run_is_better_worse_or_neither(run: Path, write_recipe: WriteRecipe, tmp_path: Path, right: list[bool], verdict: str) -> None:
    other = evaluated(tmp_path / "other", write_recipe(), right)
    found = difference(*of(run, other))
    assert isinstance(found, Difference)
    assert found.interval["value"] == pytest.approx((sum(right) - 20) / 30)
    assert (found.verdict, found.n) == (verdict, 30)
    assert verdict in shown(comparison(of(run, other)))


def test_of_many_runs_one_is_not_called_better_by_chance(run: Path, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """McNemar's p is 0.031 where six examples changed, all for the better: enough for one comparison, not for one of ten."""
    others = [evaluated(tmp_path / f"other-{number}", write_recipe(), [n < 26 for n in range(30)]) for number in range(10)]
    alone, among = difference(*of(run, others[0])), difference(*of(run, others[0]), tests=10)
    assert isinstance(alone, Difference) and isinstance(among, Difference)
    assert alone.p_value == among.p_value == pytest.approx(2 * 0.5**6)
    assert (alone.verdict, among.verdict) == ("better", "no difference shown")
    assert shown(comparison(of(run, *others))).count("no difference shown") == 10


def test_a_lower_loss_is_better_and_pieces_of_one_text_are_one_example(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe()
    first = losses(tmp_path / "first", recipe, [20.0 + n % 3 for n in range(30)])
    found = difference(*of(first, losses(tmp_path / "second", recipe, [15.0 + n % 3 for n in range(30)])))
    assert isinstance(found, Difference)
    assert (found.measure, found.verdict, found.n) == ("loss", "better", 30)
    pieces = [f"text-{n}" for n in range(30)]
    ends = [losses(tmp_path / name, recipe, [loss] * 30, pieces) for name, loss in (("third", 20.0), ("fourth", 15.0))]
    found = difference(*of(*ends))
    assert isinstance(found, Difference)
    assert (found.n, found.verdict) == (1, "no difference shown")


def test_what_cannot_be_compared_is_told(run: Path, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe = write_recipe()

    def other(name: str, **changes: Any) -> Path:
        folder = evaluated(tmp_path / name, recipe, [True] * 30)
        test = json.loads((folder / "evaluation" / "test.json").read_text())
        (folder / "evaluation" / "test.json").write_text(json.dumps(test | changes))
        return folder

    unread = other("unread")
    (unread / "evaluation" / "test.json").unlink()
    missing = other("missing")
    (missing / "evaluation" / "predictions.jsonl").unlink()
    cut = other("cut")
    whole = (cut / "evaluation" / "predictions.jsonl").read_text()
    (cut / "evaluation" / "predictions.jsonl").write_text(whole[:-5])
    relabelled = other("relabelled")
    file = relabelled / "evaluation" / "predictions.jsonl"
    file.write_text(file.read_text().replace('"label": "torch"', '"label": "sympy"', 1))
    fewer = evaluated(tmp_path / "fewer", recipe, [True] * 29)
    for folder, why in (
        (unread, "not evaluated"),
        (missing, f"{missing}/evaluation/predictions.jsonl holds 0 of the 30 examples that test.json counts; evaluate that run again"),
        (cut, f"{cut}/evaluation/predictions.jsonl holds 29 of the 30 examples that test.json counts; evaluate that run again"),
        (other("written", method="generation"), "evaluated in another way (evaluate.method)"),
        (relabelled, "evaluated on examples with other labels"),
        (fewer, "evaluated on other test examples"),
    ):
        assert difference(*of(run, folder)) == why
        assert why in shown(comparison(of(run, folder)))
    ends = [losses(tmp_path / f"targets-{targets}", recipe, [1.0] * 30, targets=targets) for targets in (10, 11)]
    assert difference(*of(*ends)) == "another tokenizer or format: the loss per token is not comparable"


def test_runs_differ_in_what_was_asked_and_in_how_they_were_evaluated(run: Path, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    other = evaluated(tmp_path / "elsewhere" / "run", write_recipe(lora={"r": 8}), [True] * 30)
    test = json.loads((other / "evaluation" / "test.json").read_text())
    (other / "evaluation" / "test.json").write_text(json.dumps(test | {"evaluate": {"max_new_tokens": 7}}))
    fields = dict(differing_fields(of(run, other)))
    assert fields == {"lora.r": [4, 8], "evaluate.max_new_tokens": [fields["evaluate.max_new_tokens"][0], 7]}
    body = shown(comparison(of(run, other)))
    assert str(run) in body and str(other) in body, "two runs of one name are told apart"


def test_a_report_is_written_over_a_report_and_nothing_else(run: Path, tmp_path: Path) -> None:
    precious = tmp_path / "notes.txt"
    precious.write_text("mine")
    with pytest.raises(RunError, match=r"notes\.txt: give the page a name that ends in \.html"):
        report([run], out=precious)
    assert precious.read_text() == "mine"
    for _ in range(2):
        report([run], out=tmp_path / "page.html")
    assert "What came of it" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("line", [b'{"id": "7", "la\n', b"\xff\xfe\n"])
def test_a_damaged_line_is_named(run: Path, line: bytes) -> None:
    """Not one that its writer has not ended yet."""
    with open(run / "metrics.jsonl", "ab") as metrics:
        metrics.write(b'{"step": 41, "lo')
    page(Facts(RunDirectory(run)))
    with open(run / "evaluation" / "predictions.jsonl", "ab") as predictions:
        predictions.write(line)
    with pytest.raises(RunError, match=r"predictions\.jsonl:31: is damaged; mend that line, or remove it"):
        Facts(RunDirectory(run)).evaluation("predictions")
