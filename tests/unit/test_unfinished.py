"""What a killed job had found is found again, and nothing else."""

from pathlib import Path

from mistral_dist.unfinished import Unfinished, read


def test_what_any_rank_has_kept_is_read_by_all(tmp_path: Path) -> None:
    for rank in (0, 1):
        kept = Unfinished(tmp_path, rank, "work", {})
        kept.add({f"a/{rank}": [0.1, rank]})
        kept.add({f"b/{rank}": "text\nof two lines", "c": None})
        assert kept.found[f"a/{rank}"] == [0.1, rank]
    assert read(tmp_path, "work") == {"a/0": [0.1, 0], "a/1": [0.1, 1], "b/0": "text\nof two lines", "b/1": "text\nof two lines", "c": None}
    assert read(tmp_path, "other work") == {}
    kept.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_a_kill_has_torn_is_passed_over(tmp_path: Path) -> None:
    Unfinished(tmp_path, 0, "work", {}).add({"a": 1})
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert read(tmp_path, "work") == {}
    file.write_bytes(whole + b'{"b": 2}')
    assert read(tmp_path, "work") == {"a": 1}
    Unfinished(tmp_path, 0, "work", {"a": 1}).add({"c": 3})
    assert read(tmp_path, "work") == {"a": 1, "c": 3}
    (damaged,) = (path for path in tmp_path.iterdir() if b'"a"' in path.read_bytes())
    damaged.write_bytes(whole + b"\0" * 4096 + b'\n\xff\xfe\n[1]\n{"d": 4}\n')  # as a machine that went down may leave it
    assert read(tmp_path, "work") == {"a": 1, "c": 3, "d": 4}
